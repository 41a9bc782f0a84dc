"""RMSNorm against its reference.

Regimes: widths off a power of two (masked tail) and on both sides of one, a width of 1, no rows,
strided and expanded rows, large and tiny values (float32 statistics), NaN and infinity in one row,
the fused residual sum, writes outside the outputs, unequal runs, bad arguments.
"""

import pytest
import torch
from hypothesis import given

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
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    edges,
    exact,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
)

EPS = 1e-5
SHAPES = [(1, 1), (3, 63), (2, 64), (2, 65), (5, 100), (2, 1000), (7, 128), (0, 64)]
REAL = on_gpu((1, 5120), (64, 5120), (4096, 5120), (3, 16384))


def test_reference_can_be_trained_through():
    """What it does in place must not be what a gradient needs."""
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 8), (8,))
    ]
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_ref(x, weight, EPS), inputs)


def _check(x, weight):
    actual = run_guarded(rms_norm, x, weight, EPS)
    truth = exact(rms_norm_ref, x, weight, EPS)
    assert_as_accurate(actual, truth, rms_norm_ref(x, weight, EPS))


@pytest.mark.parametrize("shape", [*SHAPES, *REAL], ids=str)
def test_as_accurate_as_eager(shape, device, dtypes):
    for dtype in dtypes:
        x, weight = torch.randn(shape, device=device), torch.randn(shape[1], device=device)
        _check(x.to(dtype), weight.to(dtype))


@pytest.mark.parametrize("shape", [*SHAPES, *REAL], ids=str)
def test_residual_as_accurate_as_eager(shape, device, dtypes):
    for dtype in dtypes:
        x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(shape[1], device=device).to(dtype)
        arguments = (x, residual, weight, EPS)
        actual, eager = run_guarded(add_rms_norm, *arguments), add_rms_norm_ref(*arguments)
        # the norm is taken of the rounded sum, so its truth starts there
        truth = exact(rms_norm_ref, eager.residual_TD, weight, EPS)
        assert_as_accurate(actual.normed_TD, truth, eager.normed_TD)
        assert same_bits(actual.residual_TD, eager.residual_TD)


@few_examples
@given(edges(4, 6), edges(64, 100), layouts())
def test_any_shape_and_layout(device, rows, width, layout):
    x = normal((rows, width), torch.float16, device)
    _check(laid_out(x, layout), normal((width,), torch.float16, device, seed=1))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_statistics_are_float32(scale, device):
    _check((torch.randn(4, 96, device=device) * scale).half(), torch.ones(96, device=device).half())


def test_layout_changes_no_bit(device):
    wide = torch.randn(5, 200, device=device)
    x, residual, weight = (
        wide[:, 40:140],
        wide[:1, :100].expand(5, 100),
        torch.randn(100).to(device),
    )
    assert same_bits(rms_norm(x, weight, EPS), rms_norm(x.clone(), weight, EPS))
    assert same_bits(rms_norm(residual, weight, EPS), rms_norm(residual.clone(), weight, EPS))
    strided = add_rms_norm(x, residual, weight, EPS)
    dense = add_rms_norm(x.clone(), residual.clone(), weight, EPS)
    assert same_bits(strided.normed_TD, dense.normed_TD)
    assert same_bits(strided.residual_TD, dense.residual_TD)


def test_nan_and_infinity_stay_in_their_row(device):
    x, weight = torch.randn(3, 64, device=device), torch.ones(64, device=device)
    check_rows_apart(lambda rows: rms_norm(rows, weight, EPS), x, 1)
    check_rows_apart(lambda rows: add_rms_norm(rows, x, weight, EPS), x, 1)
    x[1, 7] = torch.nan
    assert rms_norm(x, weight, EPS)[1].isnan().all()


def test_module_uses_the_weight(device):
    norm = RMSNorm(32, EPS, "triton").to(device)
    norm.weight.data.uniform_(0.5, 2.0)
    x, residual = torch.randn(2, 32, device=device), torch.randn(2, 32, device=device)
    assert same_bits(norm(x), rms_norm(x, norm.weight, EPS))
    assert torch.equal(norm.add(x, residual).residual_TD, x + residual)
    assert norm.add(x, None).residual_TD is x


def test_compiles_once_for_all_row_counts(device):
    x, weight = torch.randn(5, 48, device=device), torch.randn(48, device=device)
    check_compiles(rms_norm, x[:2], weight, EPS, again=(x, weight, EPS))
    check_compiles(add_rms_norm, x[:2], x[:2], weight, EPS, again=(x, x, weight, EPS))


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_rejects_other_dtypes(dtype, device):
    x = torch.ones(2, 4, device=device).to(dtype)
    with pytest.raises(ValueError, match="x_TD: must be float32, float16 or bfloat16"):
        rms_norm(x, x[0], EPS)


def test_rejects_no_columns(device):
    with pytest.raises(ValueError, match="x_TD: width must be at least 1"):
        rms_norm(torch.ones(2, 0, device=device), torch.ones(0, device=device), EPS)


@pytest.mark.parametrize("width", [1, 63, 128, 5120, 16384])
def test_launch_config(width):
    config = _launch_config(width)
    assert width <= config.BLOCK_D < 2 * max(width, 1)
    assert 1 <= config.num_warps <= 16
