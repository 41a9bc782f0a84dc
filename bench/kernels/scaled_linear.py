"""Llama 4's q/k/v (5120 to 7168) and output projections on FP8 rows and weights; both sides of the
crossover to torch's product, and beyond it the kernel's tiles only through block scales."""

import pytest
import torch

from aerie.kernels.quantize import FP8, quantize_ref
from aerie.kernels.scaled_linear import scaled_linear, scaled_linear_ref
from bench.shapes import ON_GPU, features_of
from bench.timer import Work

DEPTH = 5120
PROVIDERS = {"triton": scaled_linear, "eager": scaled_linear_ref}


@pytest.mark.parametrize("scales", ["channel", "block"])
@pytest.mark.parametrize("width", [5120, 7168])
@pytest.mark.parametrize("rows", [1, 8, 64, 65, 8192] if ON_GPU else [1, 8])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_scaled_linear(provider, rows, width, scales, measure, device, dtype):
    width = features_of(width, "fp8")
    codes = quantize_ref(torch.randn(rows, DEPTH, device=device), scales == "block")
    weight = torch.randn(width, DEPTH, device=device).to(FP8)
    shape = (width,) if scales == "channel" else (-(-width // 128), DEPTH // 128)
    scale = torch.rand(shape, device=device)
    moved = rows * (DEPTH + width * dtype.itemsize) + weight.numel()
    work = Work(bytes=moved, flops=2 * rows * weight.numel(), fp8_products=True)
    measure(provider, work, PROVIDERS[provider], codes, weight, scale, None, dtype)
