"""Top-1 routing over Scout's 16 and Maverick's 128 experts: a few hundred bytes, all latency."""

import pytest
import torch

from aerie.kernels.router import router, router_ref
from bench.shapes import FEW_ROWS
from bench.timer import Work

PROVIDERS = {"triton": router, "eager": router_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("num_experts", [16, 128])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_router(provider, num_experts, rows, measure, device, dtype):
    logits = torch.randn(rows, num_experts, device=device, dtype=dtype)
    work = Work(bytes=rows * (num_experts + 1) * logits.element_size() + 4 * rows)
    measure(provider, work, PROVIDERS[provider], logits, 1)
