"""Attention temperature against its reference.

Regimes: positions on both sides of a step (also where a rounded quotient would miss it), head dims
off a power of two, more heads than a program takes, no rows, a view of a fused projection, NaN in
one head, bad arguments.
"""

import pytest
import torch

from aerie.kernels.attention_temperature import (
    _attention_temperature_op,
    _launch_config,
    attention_temperature,
    attention_temperature_ref,
)

SCALE = 0.1
CASES = [(1, 10, 32), (3, 5, 24), (2, 40, 96), (0, 4, 16)]  # rows, heads, head dim
# one rounding to the dtype, and a logarithm by two libraries
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_ref(case, device, dtypes, assert_close):
    for dtype in dtypes:
        q = torch.randn(case, device=device).to(dtype)
        positions = torch.randint(100_000, case[:1], device=device)
        expected = attention_temperature_ref(q, positions, 64.0, SCALE)
        assert_close(attention_temperature(q, positions, 64.0, SCALE), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("floor_scale", [1.0, 3.0, 61.0, 8192.0])
def test_steps_at_multiples_of_the_floor_scale(floor_scale, device, assert_close):
    multiples = torch.arange(1, 21, device=device) * int(floor_scale)
    positions = torch.stack((multiples - 2, multiples - 1, multiples)).flatten().clamp(min=0)
    q = torch.ones(len(positions), 1, 2, device=device)
    steps = (positions + 1) // int(floor_scale)
    expected = (1 + SCALE * torch.log1p(steps.double())).float()[:, None, None].expand_as(q)
    actual = attention_temperature(q, positions, floor_scale, SCALE)
    assert_close(actual, expected, TOLERANCE[q.dtype])


def test_scale_is_one_below_the_floor_scale(device):
    q = torch.randn(2, 3, 16, device=device)
    positions = torch.tensor([0, 8190], device=device)
    assert torch.equal(attention_temperature(q, positions, 8192.0, SCALE), q)


def test_view_of_a_fused_projection(device, assert_close):
    q = torch.randn(3, 6 * 16, device=device)[:, : 4 * 16].unflatten(-1, (-1, 16))
    positions = torch.tensor([5, 500, 50], device=device)
    expected = attention_temperature_ref(q, positions, 8.0, SCALE)
    assert_close(attention_temperature(q, positions, 8.0, SCALE), expected, TOLERANCE[q.dtype])
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(attention_temperature(swapped, positions, 8.0, SCALE), expected, 1e-6)


def test_nan_stays_in_its_head(device):
    q, positions = torch.randn(2, 3, 16, device=device), torch.tensor([9, 99], device=device)
    q[1, 2] = torch.nan
    dirty = attention_temperature(q, positions, 8.0, SCALE).isnan()
    assert torch.equal(dirty, q.isnan())


def test_opcheck(device):
    q, positions = torch.randn(2, 3, 16, device=device), torch.tensor([9, 99], device=device)
    torch.library.opcheck(_attention_temperature_op, (q, positions, 8.0, SCALE))
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    torch.library.opcheck(_attention_temperature_op, (swapped, positions, 8.0, SCALE))


def test_rejects_bad_arguments(device):
    q, positions = torch.randn(2, 4, 16, device=device), torch.arange(2, device=device)
    with pytest.raises(ValueError, match=r"q_THK: must be a floating point \[T, H, K\]"):
        attention_temperature(q[0], positions, 8.0, SCALE)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        attention_temperature(q.transpose(1, 2), positions, 8.0, SCALE)
    with pytest.raises(ValueError, match=r"positions_T: must be a contiguous int64 \[2\]"):
        attention_temperature(q, positions[:1], 8.0, SCALE)
    with pytest.raises(ValueError, match="positions_T: must be a contiguous int64"):
        attention_temperature(q, positions.int(), 8.0, SCALE)
    with pytest.raises(ValueError, match="floor_scale: must be positive, got 0"):
        attention_temperature(q, positions, 0.0, SCALE)


@pytest.mark.parametrize("head_dim", [1, 24, 128, 256])
def test_launch_config(head_dim):
    config = _launch_config(head_dim)
    assert head_dim <= config.BLOCK_K < 2 * head_dim
    assert config.BLOCK_HEADS >= 1
    assert config.BLOCK_HEADS & (config.BLOCK_HEADS - 1) == 0
