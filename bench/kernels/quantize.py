"""Rows of Llama 4 as FP8 codes: a read of the rows and a write of half as many bytes."""

import pytest
import torch

from aerie.kernels.quantize import quantize, quantize_ref
from bench.shapes import FEW_ROWS, D
from bench.timer import Work

PROVIDERS = {"triton": quantize, "eager": quantize_ref}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_quantize(provider, rows, grouped, measure, device, dtype):
    x = torch.randn(rows, D, device=device, dtype=dtype)
    work = Work(bytes=x.numel() * (x.element_size() + 1), flops=0)
    measure(provider, work, PROVIDERS[provider], x, grouped)
