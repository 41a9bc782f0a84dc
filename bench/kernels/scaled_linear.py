"""Llama 4's q/k/v (5120 to 7168) and output projections on FP8 rows and weights; both sides of the
crossover to torch's product, and beyond it the kernel's tiles only through block scales.

The second bench includes the quantisation of its rows. Beside `linear` with FP8 weights at the same
sizes it says from how many rows on prompts should meet codes (`quantises_rows`).
"""

import pytest
import torch

from aerie.kernels.quantize import FP8, quantize, quantize_ref
from aerie.kernels.scaled_linear import scaled_linear, scaled_linear_ref
from bench.shapes import ON_GPU, features_of
from bench.timer import Work

DEPTH = 5120
PROVIDERS = {"triton": scaled_linear, "eager": scaled_linear_ref}
CROSSOVER = (64, 256, 1024)  # rows; `linear` has the same
IN_CODES = {
    "triton": lambda x, w, scale: scaled_linear(quantize(x), w, scale, None, x.dtype),
    "eager": lambda x, w, scale: scaled_linear_ref(quantize_ref(x), w, scale, None, x.dtype),
}


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


@pytest.mark.parametrize("width", [5120, 7168])
@pytest.mark.parametrize("rows", CROSSOVER if ON_GPU else CROSSOVER[:1])
@pytest.mark.parametrize("provider", IN_CODES)
def bench_scaled_linear_of_rows(provider, rows, width, measure, device, dtype):
    width = features_of(width, "fp8")
    x = torch.randn(rows, DEPTH, device=device, dtype=dtype)
    weight = torch.randn(width, DEPTH, device=device).to(FP8)
    scale = torch.rand(width, device=device)
    moved = rows * (DEPTH + width) * dtype.itemsize + weight.numel()
    work = Work(bytes=moved, flops=2 * rows * weight.numel(), fp8_products=True)
    measure(provider, work, IN_CODES[provider], x, weight, scale)
