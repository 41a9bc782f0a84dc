"""Attention temperature against its reference.

Regimes: positions on both sides of a step (also where a rounded quotient would miss it), head dims
off a power of two, more heads than a program takes, no rows, strided and expanded queries, NaN and
infinity in one head, writes outside the output, unequal runs, bad arguments.
"""

import pytest
import torch
from hypothesis import given

from aerie.kernels.attention_temperature import (
    _attention_temperature_op,
    _launch_config,
    attention_temperature,
    attention_temperature_ref,
)
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    edges,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
)

SCALE = 0.1
# rows, heads, head dim; 32 heads of 32 fill a program
CASES = [(1, 10, 32), (1, 31, 32), (1, 32, 32), (3, 11, 32), (3, 5, 24), (2, 40, 96), (0, 4, 16)]
REAL = on_gpu((1, 40, 128), (64, 40, 128), (4096, 40, 128))


def _truth(q, positions, floor_scale):
    """The formula of the kernel's docstring in float64."""
    step = ((positions.double() + 1) / floor_scale).floor()
    return q.double() * (1 + SCALE * step.log1p())[:, None, None]


def _check(q, positions, floor_scale=64.0):
    arguments = (q, positions, floor_scale, SCALE)
    actual = run_guarded(attention_temperature, *arguments)
    assert_as_accurate(
        actual, _truth(q, positions, floor_scale), attention_temperature_ref(*arguments)
    )


@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_as_accurate_as_eager(case, device, dtypes):
    for dtype in dtypes:
        q = torch.randn(case, device=device).to(dtype)
        _check(q, torch.randint(100_000, case[:1], device=device))


@few_examples
@given(edges(4, 5), edges(8, 9), edges(32, 40), layouts())
def test_any_shape_and_layout(device, rows, heads, head_dim, layout):
    q = normal((rows, heads, head_dim), torch.float32, device)
    _check(laid_out(q, layout), torch.arange(rows, device=device) * 700)


@pytest.mark.parametrize("floor_scale", [1.0, 3.0, 61.0, 8192.0])
def test_steps_at_multiples_of_the_floor_scale(floor_scale, device):
    multiples = torch.arange(1, 21, device=device) * int(floor_scale)
    positions = torch.stack((multiples - 2, multiples - 1, multiples)).flatten().clamp(min=0)
    q = torch.ones(len(positions), 1, 2, device=device)
    steps = (positions + 1) // int(floor_scale)
    exact = (1 + SCALE * torch.log1p(steps.double()))[:, None, None].expand_as(q)
    actual = attention_temperature(q, positions, floor_scale, SCALE)
    assert_as_accurate(actual, exact, exact.float())


def test_scale_is_one_below_the_floor_scale(device):
    q = torch.randn(2, 3, 16, device=device)
    positions = torch.tensor([0, 8190], device=device)
    assert torch.equal(attention_temperature(q, positions, 8192.0, SCALE), q)


def test_layout_changes_no_bit(device):
    q = torch.randn(3, 6 * 16, device=device)[:, : 4 * 16].unflatten(-1, (-1, 16))
    positions = torch.tensor([5, 500, 50], device=device)
    _check(q, positions)
    expected = attention_temperature(q, positions, 8.0, SCALE)
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(attention_temperature(swapped, positions, 8.0, SCALE), expected)
    expanded = q[:, :1].expand(3, 4, 16)
    repeated = attention_temperature(expanded, positions, 8.0, SCALE)
    assert same_bits(repeated, attention_temperature(expanded.clone(), positions, 8.0, SCALE))


def test_nan_and_infinity_stay_in_their_row(device):
    q, positions = torch.randn(3, 3, 16, device=device), torch.tensor([9, 99, 999], device=device)
    check_rows_apart(lambda x: attention_temperature(x, positions, 8.0, SCALE), q, 1)


def test_nan_stays_in_its_head(device):
    q, positions = torch.randn(2, 3, 16, device=device), torch.tensor([9, 99], device=device)
    q[1, 2] = torch.nan
    dirty = attention_temperature(q, positions, 8.0, SCALE).isnan()
    assert torch.equal(dirty, q.isnan())


def test_compiles_once_for_all_row_counts(device):
    q, positions = torch.randn(5, 4, 16, device=device), torch.arange(5, device=device)
    check_compiles(
        attention_temperature,
        *(q[:2], positions[:2], 8.0, SCALE),
        again=(q, positions, 8.0, SCALE),
    )


def test_opcheck(device):
    q, positions = torch.randn(2, 3, 16, device=device), torch.tensor([9, 99], device=device)
    torch.library.opcheck(_attention_temperature_op, (q, positions, 8.0, SCALE))
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(_attention_temperature_op, (swapped, positions, 8.0, SCALE))


def test_rejects_bad_arguments(device):
    q, positions = torch.randn(2, 4, 16, device=device), torch.arange(2, device=device)
    with pytest.raises(ValueError, match=r"q_THK: must be \[T, H, K\]"):
        attention_temperature(q[0], positions, 8.0, SCALE)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        attention_temperature(q.transpose(1, 2), positions, 8.0, SCALE)
    with pytest.raises(ValueError, match=r"positions_T: must be a contiguous int64 \[2\]"):
        attention_temperature(q, positions[:1], 8.0, SCALE)
    with pytest.raises(ValueError, match="positions_T: must be a contiguous int64"):
        attention_temperature(q, positions.int(), 8.0, SCALE)
    with pytest.raises(ValueError, match="positions_T: must be a contiguous int64"):
        attention_temperature(q, positions[:1].expand(2), 8.0, SCALE)
    with pytest.raises(ValueError, match="q_THK: must be float32, float16 or bfloat16"):
        attention_temperature(q.int(), positions, 8.0, SCALE)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="floor_scale: must be positive, got "):
            attention_temperature(q, positions, bad, SCALE)


def test_rejects_float64(device):
    q, positions = torch.ones(2, 3, 4, device=device).double(), torch.arange(2, device=device)
    with pytest.raises(ValueError, match="q_THK: must be float32, float16 or bfloat16"):
        attention_temperature(q, positions, 8.0, SCALE)


@pytest.mark.parametrize("head_dim", [1, 24, 128, 256])
def test_launch_config(head_dim):
    config = _launch_config(head_dim)
    assert head_dim <= config.BLOCK_K < 2 * head_dim
    assert config.BLOCK_HEADS >= 1
    assert config.BLOCK_HEADS & (config.BLOCK_HEADS - 1) == 0
