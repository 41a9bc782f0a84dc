"""Attention temperature on Llama 4's 40 query heads of 128: one read and one write."""

import pytest
import torch

from aerie.kernels.attention_temperature import attention_temperature, attention_temperature_ref
from bench.shapes import FEW_ROWS, H, K
from bench.timer import Work

FLOOR_SCALE, ATTN_SCALE = 8192.0, 0.1
PROVIDERS = {"triton": attention_temperature, "eager": attention_temperature_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_attention_temperature(provider, rows, measure, device, dtype):
    q = torch.randn(rows, H, K, device=device, dtype=dtype)
    positions = torch.randint(100_000, (rows,), device=device)
    work = Work(bytes=2 * rows * H * K * q.element_size() + 8 * rows)
    measure(provider, work, PROVIDERS[provider], q, positions, FLOOR_SCALE, ATTN_SCALE)
