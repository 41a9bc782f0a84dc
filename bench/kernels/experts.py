"""Routed experts of Llama 4, one of eight slices (width 1024): the distinct experts are the bytes.

Row t goes to expert t modulo the given number of distinct experts, so that the bytes are known.
"""

import pytest
import torch

from aerie.kernels.experts import experts, experts_ref
from aerie.kernels.router import Routing
from bench.timer import Work

NUM_EXPERTS, DEPTH, WIDTH = 8, 5120, 1024
PROVIDERS = {"triton": experts, "eager": experts_ref}


@pytest.mark.parametrize(("rows", "distinct"), [(1, 1), (5, 1), (5, 5), (16, 8)])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_experts(provider, rows, distinct, measure, device, dtype):
    x, shared = torch.randn(2, rows, DEPTH, device=device, dtype=dtype)
    gate_up = torch.randn(NUM_EXPERTS, DEPTH, 2 * WIDTH, device=device, dtype=dtype) / 64
    down = torch.randn(NUM_EXPERTS, WIDTH, DEPTH, device=device, dtype=dtype) / 64
    ids = (torch.arange(rows, device=device, dtype=torch.int32) % distinct)[:, None]
    routing = Routing(ids, torch.full((rows, 1), 0.5, device=device, dtype=dtype))
    elements = 3 * distinct * DEPTH * WIDTH + 3 * rows * DEPTH
    work = Work(bytes=elements * x.element_size(), flops=6 * rows * DEPTH * WIDTH)
    measure(provider, work, PROVIDERS[provider], x, routing, gate_up, down, shared)
