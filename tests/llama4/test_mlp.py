"""The SwiGLU feed-forward with FP8 weights: rows as they are, and as codes.

Regimes: scales per channel and block, both backends; codes that a caller has; two halves of the
width, as two ranks have them; weights that are not FP8.
"""

import pytest
import torch
from torch import Tensor

from aerie.kernels.linear import Linear
from aerie.kernels.quantize import Quantized, quantize_ref
from aerie.kernels.scaled_linear import scaled_linear_ref
from aerie.kernels.swiglu import swiglu_halves_ref
from aerie.llama4.mlp import MLP
from aerie.llama4.weight_quantization import BLOCK, quantize_weight
from tests.evidence import assert_as_accurate, exact, normal

WIDTH, INNER = 128, 256
BACKENDS = ("eager", "triton")


def fill(linear: Linear, weight: Tensor, is_blocked: bool) -> None:
    """Makes it FP8, with the codes and scales of `weight`."""
    rows, columns = weight.shape
    linear.hold_fp8((-(-rows // BLOCK), -(-columns // BLOCK)) if is_blocked else (rows,))
    assert linear.weight_scale is not None
    quantize_weight(weight, linear.weight.data, linear.weight_scale.data)


def fp8_mlp(backend, is_blocked: bool, device, inner: slice = slice(0, INNER)) -> MLP:
    """With the columns `inner` of one set of weights."""
    gate, up = normal((2, INNER, WIDTH), torch.float32, "cpu", 1) * WIDTH**-0.5
    down = normal((WIDTH, INNER), torch.float32, "cpu", 2) * INNER**-0.5
    mlp = MLP(WIDTH, inner.stop - inner.start, backend)
    fill(mlp.gate_up_proj, torch.cat([gate[inner], up[inner]]), is_blocked)
    fill(mlp.down_proj, down[:, inner].contiguous(), is_blocked)
    return mlp.to(device)


def rows_of(count: int, device) -> Tensor:
    return normal((count, WIDTH), torch.float32, device, 3)


def in_codes_ref(
    x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """Both products of codes, in the precision of `x`."""
    is_blocked = gate_up_scale.ndim == 2
    both = scaled_linear_ref(quantize_ref(x, is_blocked), gate_up, gate_up_scale, None, x.dtype)
    inner = quantize_ref(swiglu_halves_ref(both), is_blocked)
    return scaled_linear_ref(inner, down, down_scale, None, x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_blocked", [False, True])
def test_rows_of_prompts_are_codes(is_blocked, backend, device):
    mlp, x = fp8_mlp(backend, is_blocked, device), rows_of(5, device)
    weights = [t for p in (mlp.gate_up_proj, mlp.down_proj) for t in (p.weight, p.weight_scale)]
    actual = mlp(x, quantises=True)
    expected = in_codes_ref(x, *weights)
    # not against float64, where a sum's last bit may be another code of `down`'s rows
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    as_it_is = mlp(x)
    assert 5e-3 < (actual - as_it_is).norm() / as_it_is.norm() < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_rounds_are_not_rounded(backend, device):
    mlp, x = fp8_mlp(backend, False, device), rows_of(5, device)
    gate_up, down = mlp.gate_up_proj, mlp.down_proj

    def ref(x, gate_up, gate_up_scale, down, down_scale):
        both = x @ (gate_up.to(x.dtype) * gate_up_scale[:, None]).T
        return swiglu_halves_ref(both) @ (down.to(x.dtype) * down_scale[:, None]).T

    arguments = (x, gate_up.weight, gate_up.weight_scale, down.weight, down.weight_scale)
    assert_as_accurate(mlp(x), exact(ref, *arguments), ref(*arguments))


@pytest.mark.parametrize("is_blocked", [False, True])
def test_given_codes_are_used(is_blocked, device):
    mlp, x = fp8_mlp("eager", is_blocked, device), rows_of(4, device)
    codes = quantize_ref(x, is_blocked)
    expected = mlp(x, quantises=True)
    assert torch.equal(mlp(x * torch.nan, True, codes), expected)
    moved = Quantized(codes.codes_TD, 2 * codes.scales_TN)
    assert not torch.equal(mlp(x, True, moved), expected)
    assert torch.equal(mlp(x, False, moved), mlp(x))


def test_halves_of_two_ranks_add_up(device):
    """A half's rows have scales of their own, so the sum is another number, and as close."""
    x = rows_of(40, device)
    truth, whole = fp8_mlp("eager", False, device)(x), fp8_mlp("eager", False, device)(x, True)
    halves = [slice(0, INNER // 2), slice(INNER // 2, INNER)]
    parts = [fp8_mlp("eager", False, device, half)(x, True) for half in halves]
    errors = [(y - truth).norm() / truth.norm() for y in (whole, sum(parts))]
    assert errors[1] < 1.2 * errors[0] < 0.1


def test_unquantised_weights_never_meet_codes(device):
    mlp = MLP(WIDTH, INNER, "eager").to(device)
    for parameter in mlp.parameters():
        parameter.data.normal_(std=0.1)
    x = rows_of(3, device)
    assert torch.equal(mlp(x, quantises=True), mlp(x))
