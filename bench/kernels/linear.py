"""Llama 4's fused q/k/v projection, 5120 to 7168: the weights are nearly all of the bytes."""

import pytest
import torch

from aerie.kernels.linear import linear, linear_ref
from bench.timer import Work

DEPTH, WIDTH = 5120, 7168
PROVIDERS = {"triton": linear, "eager": linear_ref}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_linear(provider, rows, measure, device, dtype):
    x = torch.randn(rows, DEPTH, device=device, dtype=dtype)
    weight = torch.randn(WIDTH, DEPTH, device=device, dtype=dtype)
    elements = WIDTH * DEPTH + rows * (DEPTH + WIDTH)
    work = Work(bytes=elements * x.element_size(), flops=2 * rows * DEPTH * WIDTH)
    measure(provider, work, PROVIDERS[provider], x, weight)
