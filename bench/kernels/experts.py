"""Routed experts of Llama 4 Scout: the distinct experts of a step are the bytes.

Row t goes to expert t modulo the given number of distinct experts, so that the bytes are known:
one for all rows (clustered), every row its own (worst), and what uniform routing expects between.
A CPU gets 4 experts of width 512 instead of 16 of 8192.
"""

import pytest
import torch

from aerie.kernels.experts import experts, experts_ref
from aerie.kernels.router import Routing
from bench.shapes import ON_GPU, D, E, F
from bench.timer import Work

GPU_CASES = [(1, 1), (4, 4), (8, 1), (8, 6), (8, 8), (16, 10), (32, 14), (64, 16)]
CASES = GPU_CASES if ON_GPU else [(1, 1), (8, 1), (8, 4)]
PROVIDERS = {"triton": experts, "eager": experts_ref}


@pytest.mark.parametrize(("rows", "distinct"), CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_experts(provider, rows, distinct, measure, device, dtype):
    x, shared = torch.randn(2, rows, D, device=device, dtype=dtype)
    gate_up = torch.randn(E, D, 2 * F, device=device, dtype=dtype).mul_(D**-0.5)
    down = torch.randn(E, F, D, device=device, dtype=dtype).mul_(F**-0.5)
    ids = (torch.arange(rows, device=device, dtype=torch.int32) % distinct)[:, None]
    routing = Routing(ids, torch.full((rows, 1), 0.5, device=device, dtype=dtype))
    elements = 3 * distinct * D * F + 3 * rows * D  # rows and the shared part in, their sum out
    work = Work(bytes=elements * x.element_size(), flops=6 * rows * D * F)
    measure(provider, work, PROVIDERS[provider], x, routing, gate_up, down, shared)
