"""SwiGLU against its reference.

Regimes: widths off a power of two and on both sides of a block, no rows, the halves of one fused
tensor, expanded rows, saturated gates (exp overflows on one side), NaN and infinity in one row,
writes outside the output, unequal runs, bad arguments.
"""

import pytest
import torch
from hypothesis import given

from aerie.kernels.swiglu import _launch_config, _swiglu_op, swiglu, swiglu_ref
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

SHAPES = [(1, 1), (3, 63), (2, 1023), (2, 1024), (2, 1025), (2, 1500), (5, 128), (0, 64)]
REAL = on_gpu((1, 8192), (64, 8192), (64, 16384), (4096, 8192))


def test_reference_can_be_trained_through():
    """What it does in place must not be what a gradient needs."""
    inputs = [torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu_ref, inputs)


def _check(gate, up):
    actual = run_guarded(swiglu, gate, up)
    assert_as_accurate(actual, exact(swiglu_ref, gate, up), swiglu_ref(gate, up))
    return actual


@pytest.mark.parametrize("shape", [*SHAPES, *REAL], ids=str)
def test_as_accurate_as_eager(shape, device, dtypes):
    for dtype in dtypes:
        _check(*(torch.randn(shape, device=device).to(dtype) for _ in range(2)))


@few_examples
@given(edges(4, 6), edges(64, 100), layouts(), layouts())
def test_any_shape_and_layout(device, rows, width, layout, other_layout):
    gate, up = (normal((rows, width), torch.float16, device, seed) for seed in (0, 1))
    _check(laid_out(gate, layout), laid_out(up, other_layout))


def test_layout_changes_no_bit(device):
    gate, up = torch.randn(4, 126, device=device).chunk(2, dim=-1)
    dense = _check(gate.contiguous(), up.contiguous())
    assert same_bits(swiglu(gate, up.contiguous()), dense)  # two different row strides
    assert same_bits(swiglu(gate, up), dense)
    assert same_bits(swiglu(gate[:1].expand(4, 63), up)[0], dense[0])


def test_saturated_gates(device):
    gate = torch.tensor([[-1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4]], device=device)
    assert _check(gate, torch.ones_like(gate))[0, :2].tolist() == [0.0, 0.0]


def test_silu_is_rounded_before_the_product(device, dtypes):
    gate = torch.linspace(-4, 4, 400, device=device)[None].half()
    up = torch.full_like(gate, 1.0009765625)
    assert (swiglu(gate, up) != swiglu_ref(gate.float(), up.float()).half()).any()
    matching = (swiglu(gate, up) == swiglu_ref(gate, up)).float().mean()
    assert matching > 0.98  # the rest: silu itself on the edge of a rounding


def test_nan_and_infinity_stay_in_their_row(device):
    gate, up = torch.randn(3, 40, device=device), torch.randn(3, 40, device=device)
    check_rows_apart(lambda x: swiglu(x, up), gate, 1)
    check_rows_apart(lambda x: swiglu(gate, x), up, 1)
    gate[1] = torch.nan
    assert swiglu(gate, up)[1].isnan().all()


def test_compiles_once_for_all_row_counts(device):
    gate, up = torch.randn(5, 48, device=device), torch.randn(5, 48, device=device)
    check_compiles(swiglu, gate[:2], up[:2], again=(gate, up))


def test_opcheck(device):
    gate, up = torch.randn(3, 48, device=device), torch.randn(3, 48, device=device)
    torch.library.opcheck(_swiglu_op, (gate, up))
    torch.library.opcheck(_swiglu_op, tuple(torch.randn(3, 64, device=device).chunk(2, dim=-1)))


def test_rejects_bad_arguments(device):
    x = torch.randn(4, 16, device=device)
    with pytest.raises(ValueError, match=r"gate_TF: must be \[T, F\]"):
        swiglu(x[0], x[0])
    with pytest.raises(ValueError, match="gate_TF: must be float32, float16 or bfloat16"):
        swiglu(x.int(), x.int())
    with pytest.raises(ValueError, match="up_TF: .* contiguous last dimension"):
        swiglu(x, x.t())
    with pytest.raises(ValueError, match="up_TF: must match"):
        swiglu(x, x[:2])
    with pytest.raises(ValueError, match="up_TF: must match"):
        swiglu(x, x.half())


def test_rejects_float64(device):
    x = torch.ones(2, 3, device=device).double()
    with pytest.raises(ValueError, match="gate_TF: must be float32, float16 or bfloat16"):
        swiglu(x, x)


@pytest.mark.parametrize("width", [1, 63, 128, 16384])
def test_launch_config(width):
    config = _launch_config(width)
    assert config.BLOCK_F <= 1024
    assert config.BLOCK_F & (config.BLOCK_F - 1) == 0
    assert 1 <= config.num_warps <= 16
