"""Aux projection against its reference.

Regimes: one to eight taps, widths off the tile in all three directions, rows past one tile, with
and without bias, tap order, strided taps, NaN in one row, no rows, the module's parameters, bad
arguments.
"""

import pytest
import torch

from aerie.kernels.aux_projection import (
    MAX_TAPS,
    AuxProjection,
    _aux_projection_op,
    _launch_config,
    aux_projection,
    aux_projection_ref,
)

# one rounding to the dtype, plus a float32 sum of I*D products in another order
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# taps, rows, width of a tap, output width
CASES = [(1, 1, 1, 1), (3, 5, 63, 100), (3, 17, 100, 33), (2, 70, 16, 16), (8, 3, 70, 20)]


def _inputs(num_taps, rows, width, width_out, device, dtype=torch.float32):
    taps = [torch.randn(rows, width, device=device).to(dtype) for _ in range(num_taps)]
    weight = torch.randn(width_out, num_taps * width, device=device).to(dtype)
    return taps, weight, torch.randn(width_out, device=device).to(dtype)


@pytest.mark.parametrize("case", [*CASES, (3, 0, 32, 32)], ids=str)
def test_matches_ref(case, device, dtypes, assert_close):
    for dtype in dtypes:
        taps, weight, bias = _inputs(*case, device, dtype)
        actual = aux_projection(taps, weight)
        assert_close(actual, aux_projection_ref(taps, weight), TOLERANCE[dtype])
        actual = aux_projection(taps, weight, bias)
        assert_close(actual, aux_projection_ref(taps, weight, bias), TOLERANCE[dtype])


@pytest.mark.parametrize("num_taps", range(1, MAX_TAPS + 1))
def test_every_tap_meets_its_columns(num_taps, device):
    taps = [torch.full((2, 4), 10.0**i, device=device) for i in range(num_taps)]
    weight = torch.zeros(num_taps, num_taps * 4, device=device)
    for i in range(num_taps):
        weight[i, i * 4] = 1.0
    expected = [10.0**i for i in range(num_taps)]
    assert aux_projection(taps, weight).tolist() == [expected, expected]


def test_strided_taps(device, assert_close):
    wide = torch.randn(5, 4, 40, device=device)
    taps, weight = [wide[:, 0], wide[:, 1], wide[:, 2, :].clone()], torch.randn(30, 120).to(device)
    actual, expected = aux_projection(taps, weight), aux_projection_ref(taps, weight)
    assert_close(actual, expected, TOLERANCE[torch.float32])


def test_nan_stays_in_its_row(device):
    taps, weight, bias = _inputs(3, 4, 40, 24, device)
    clean = aux_projection(taps, weight, bias)
    taps[2][1, 7] = torch.nan
    poisoned = aux_projection(taps, weight, bias)
    assert torch.equal(poisoned[[0, 2, 3]], clean[[0, 2, 3]])
    assert poisoned[1].isnan().all()


@pytest.mark.parametrize("bias", [False, True])
def test_module_uses_its_parameters(bias, device, assert_close):
    module = AuxProjection(16, 3, 24, bias, "triton").to(device)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"][: 1 + bias]
    taps, weight, bias_F = _inputs(3, 2, 16, 24, device)
    module.load_state_dict({"weight": weight, "bias": bias_F} if bias else {"weight": weight})
    expected = aux_projection_ref(taps, weight, bias_F if bias else None)
    assert_close(module(taps), expected, TOLERANCE[torch.float32])


def test_opcheck(device):
    taps, weight, bias = _inputs(3, 2, 16, 24, device)
    torch.library.opcheck(_aux_projection_op, (taps, weight, bias))
    torch.library.opcheck(_aux_projection_op, (taps[:1], weight[:, :16], None))


def test_rejects_bad_arguments(device):
    taps, weight, bias = _inputs(3, 2, 16, 24, device)
    for bad in ([], taps * 3):
        with pytest.raises(ValueError, match=f"taps: must be 1 to {MAX_TAPS} tensors"):
            aux_projection(bad, weight)
    with pytest.raises(ValueError, match=r"taps\[1\]: must be \[T, D\]"):
        aux_projection([taps[0], taps[1][:, :8], taps[2]], weight)
    with pytest.raises(ValueError, match=r"taps\[0\]: must be .* got .* torch.float16"):
        aux_projection([taps[0].half(), taps[1], taps[2]], weight)
    with pytest.raises(ValueError, match=r"weight_FI: must be \[F, 48\]"):
        aux_projection(taps, weight[:, :32])
    with pytest.raises(ValueError, match=r"bias: must be a contiguous \[24\]"):
        aux_projection(taps, weight, bias[:8])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 17, 1000])
def test_launch_config(rows, itemsize):
    config = _launch_config(rows, itemsize)
    assert 16 <= config.BLOCK_T <= 64
    stage = (config.BLOCK_F + config.BLOCK_T) * config.BLOCK_D * itemsize
    assert config.num_stages * stage <= 100 * 1024
