"""Pairs sorted by expert, of a step and of a prompt, 16 and 128 experts: all latency."""

import pytest
import torch

from aerie.kernels.expert_order import expert_order, expert_order_ref
from bench.shapes import ON_GPU
from bench.timer import Work

CASES = [(8, 16), (64, 16), (64, 128), (8192, 128)] if ON_GPU else [(8, 16), (64, 16)]
PROVIDERS = {"triton": expert_order, "eager": expert_order_ref}


@pytest.mark.parametrize(("rows", "experts"), CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_expert_order(provider, rows, experts, measure, device):
    ids = torch.randint(experts, (rows, 1), device=device, dtype=torch.int32)
    measure(provider, Work(bytes=8 * rows, flops=0), PROVIDERS[provider], ids, experts, 0, 64)
