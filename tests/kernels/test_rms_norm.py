"""RMSNorm against its reference.

Regimes: widths off a power of two (masked tail), a width of 1, no rows, a row stride (a slice of a
wider tensor), large and tiny values (float32 statistics), the fused residual sum, bad arguments.
"""

import pytest
import torch

from aerie.kernels.rms_norm import (
    MAX_WIDTH,
    RMSNorm,
    _add_rms_norm_op,
    _launch_config,
    _rms_norm_op,
    add_rms_norm,
    add_rms_norm_ref,
    rms_norm,
    rms_norm_ref,
)

EPS = 1e-5
# one rounding to the dtype, plus a sum of D squares in another order (about 1e-7 relative)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 1), (3, 63), (5, 100), (2, 1000), (7, 128), (0, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_ref(shape, device, dtypes, assert_close):
    for dtype in dtypes:
        x, weight = torch.randn(shape, device=device), torch.randn(shape[1], device=device)
        x, weight = x.to(dtype), weight.to(dtype)
        assert_close(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_matches_ref(shape, device, dtypes, assert_close):
    for dtype in dtypes:
        x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(shape[1], device=device).to(dtype)
        actual = add_rms_norm(x, residual, weight, EPS)
        expected = add_rms_norm_ref(x, residual, weight, EPS)
        assert_close(actual.normed_TD, expected.normed_TD, TOLERANCE[dtype])
        assert torch.equal(actual.residual_TD, expected.residual_TD)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_statistics_are_float32(scale, device, assert_close):
    x = (torch.randn(4, 96, device=device) * scale).half()
    weight = torch.ones(96, device=device).half()
    assert_close(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), TOLERANCE[x.dtype])


def test_strided_rows(device, assert_close):
    wide = torch.randn(5, 200, device=device)
    x, weight = wide[:, 40:140], torch.randn(100, device=device)
    assert_close(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS), TOLERANCE[x.dtype])


def test_nan_stays_in_its_row(device):
    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    clean = rms_norm(x, weight, EPS)
    x[1, 7] = torch.nan
    poisoned = rms_norm(x, weight, EPS)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])
    assert poisoned[1].isnan().all()


def test_module_uses_the_weight(device, assert_close):
    norm = RMSNorm(32, EPS, "triton").to(device)
    norm.weight.data.uniform_(0.5, 2.0)
    x, residual = torch.randn(2, 32, device=device), torch.randn(2, 32, device=device)
    assert_close(norm(x), rms_norm_ref(x, norm.weight, EPS), TOLERANCE[x.dtype])
    assert torch.equal(norm.add(x, residual).residual_TD, x + residual)
    assert norm.add(x, None).residual_TD is x


def test_opcheck(device):
    x, weight = torch.randn(3, 48, device=device), torch.randn(48, device=device)
    torch.library.opcheck(_rms_norm_op, (x, weight, EPS))
    torch.library.opcheck(
        _rms_norm_op, (torch.randn(3, 96, device=device)[:, ::2][:, :48].contiguous(), weight, EPS)
    )
    torch.library.opcheck(_add_rms_norm_op, (x, x.clone(), weight, EPS))


def test_rejects_bad_arguments(device):
    x, weight = torch.randn(2, 16, device=device), torch.ones(16, device=device)
    with pytest.raises(ValueError, match=r"x_TD: must be \[T, D\]"):
        rms_norm(x[0], weight, EPS)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        rms_norm(x.t(), torch.ones(2, device=device), EPS)
    with pytest.raises(ValueError, match=r"weight_D: must be a contiguous \[16\]"):
        rms_norm(x, weight[:8], EPS)
    with pytest.raises(ValueError, match="residual_TD: must match"):
        add_rms_norm(x, x[:1], weight, EPS)
    with pytest.raises(ValueError, match=f"at most {MAX_WIDTH}"):
        rms_norm(torch.empty(1, MAX_WIDTH + 1), weight, EPS)


@pytest.mark.parametrize("width", [1, 63, 128, 5120, 16384])
def test_launch_config(width):
    config = _launch_config(width)
    assert width <= config.BLOCK_D < 2 * max(width, 1)
    assert 1 <= config.num_warps <= 16
