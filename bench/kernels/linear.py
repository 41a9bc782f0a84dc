"""Llama 4's q/k/v (5120 to 7168) and output (5120 to 5120, split depth) projections."""

import pytest
import torch

from aerie.kernels.linear import linear, linear_ref
from bench.shapes import ON_GPU, features_of
from bench.timer import Work

DEPTH = 5120
PROVIDERS = {"triton": linear, "eager": linear_ref}


@pytest.mark.parametrize("weight_dtype", ["dtype", "fp8"])
@pytest.mark.parametrize("width", [5120, 7168])
@pytest.mark.parametrize("rows", [1, 5, 64, 256, 1024] if ON_GPU else [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_linear(provider, rows, width, weight_dtype, measure, device, dtype):
    x = torch.randn(rows, DEPTH, device=device, dtype=dtype)
    width = features_of(width, weight_dtype)
    weight = torch.randn(width, DEPTH, device=device, dtype=dtype)
    scale = None
    if weight_dtype == "fp8":
        weight = weight.to(torch.float8_e4m3fn)
        scale = torch.rand(width, device=device)
    moved = rows * (DEPTH + width) * x.element_size()
    size = weight.numel() * weight.element_size()
    work = Work(bytes=size + moved, flops=2 * rows * weight.numel())
    measure(provider, work, PROVIDERS[provider], x, weight, None, scale)
