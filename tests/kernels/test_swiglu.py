"""SwiGLU against its reference.

Regimes: widths off a power of two and wider than a block, no rows, the halves of one fused tensor,
saturated gates (exp overflows on one side), NaN in one row, bad arguments.
"""

import pytest
import torch

from aerie.kernels.swiglu import _launch_config, _swiglu_op, swiglu, swiglu_ref

SHAPES = [(1, 1), (3, 63), (2, 1500), (5, 128), (0, 64)]
# exp and the division differ in the last bit, so silu may round to the neighbour in the dtype
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_ref(shape, device, dtypes, assert_close):
    for dtype in dtypes:
        gate, up = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        assert_close(swiglu(gate, up), swiglu_ref(gate, up), TOLERANCE[dtype])


def test_halves_of_one_tensor(device, assert_close):
    gate, up = torch.randn(4, 126, device=device).chunk(2, dim=-1)
    assert_close(swiglu(gate, up), swiglu_ref(gate, up), TOLERANCE[gate.dtype])
    assert torch.equal(swiglu(gate, up.contiguous()), swiglu(gate, up))  # two different row strides


def test_saturated_gates(device, assert_close):
    gate = torch.tensor([[-1e4, -200.0, -20.0, 0.0, 20.0, 200.0, 1e4]], device=device)
    up = torch.ones_like(gate)
    assert_close(swiglu(gate, up), swiglu_ref(gate, up), TOLERANCE[gate.dtype])
    assert swiglu(gate, up)[0, :2].tolist() == [0.0, 0.0]


def test_silu_is_rounded_before_the_product(device, dtypes):
    gate = torch.linspace(-4, 4, 400, device=device)[None].half()
    up = torch.full_like(gate, 1.0009765625)
    assert (swiglu(gate, up) != swiglu_ref(gate.float(), up.float()).half()).any()
    matching = (swiglu(gate, up) == swiglu_ref(gate, up)).float().mean()
    assert matching > 0.98  # the rest: silu itself on the edge of a rounding


def test_nan_stays_in_its_row(device):
    gate, up = torch.randn(3, 40, device=device), torch.randn(3, 40, device=device)
    clean = swiglu(gate, up)
    gate[1] = torch.nan
    poisoned = swiglu(gate, up)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])
    assert poisoned[1].isnan().all()


def test_opcheck(device):
    gate, up = torch.randn(3, 48, device=device), torch.randn(3, 48, device=device)
    torch.library.opcheck(_swiglu_op, (gate, up))
    torch.library.opcheck(_swiglu_op, tuple(torch.randn(3, 64, device=device).chunk(2, dim=-1)))


def test_rejects_bad_arguments(device):
    x = torch.randn(4, 16, device=device)
    with pytest.raises(ValueError, match=r"gate_TF: must be a floating point \[T, F\]"):
        swiglu(x[0], x[0])
    with pytest.raises(ValueError, match="gate_TF: must be a floating point"):
        swiglu(x.int(), x.int())
    with pytest.raises(ValueError, match="up_TF: .* contiguous last dimension"):
        swiglu(x, x.t())
    with pytest.raises(ValueError, match="up_TF: must match"):
        swiglu(x, x[:2])
    with pytest.raises(ValueError, match="up_TF: must match"):
        swiglu(x, x.half())


@pytest.mark.parametrize("width", [1, 63, 128, 16384])
def test_launch_config(width):
    config = _launch_config(width)
    assert config.BLOCK_F <= 1024
    assert config.BLOCK_F & (config.BLOCK_F - 1) == 0
    assert 1 <= config.num_warps <= 16
