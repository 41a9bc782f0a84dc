"""Attention temperature on Llama 4's 40 query heads of 128: one read and one write."""

import pytest
import torch

from aerie.kernels.attention_temperature import attention_temperature, attention_temperature_ref
from bench.timer import Work

HEADS, HEAD_DIM, FLOOR_SCALE, ATTN_SCALE = 40, 128, 8192.0, 0.1
PROVIDERS = {"triton": attention_temperature, "eager": attention_temperature_ref}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_attention_temperature(provider, rows, measure, device, dtype):
    q = torch.randn(rows, HEADS, HEAD_DIM, device=device, dtype=dtype)
    positions = torch.randint(100_000, (rows,), device=device)
    work = Work(bytes=2 * rows * HEADS * HEAD_DIM * q.element_size() + 8 * rows)
    measure(provider, work, PROVIDERS[provider], q, positions, FLOOR_SCALE, ATTN_SCALE)
