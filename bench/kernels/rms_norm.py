"""Residual add + RMSNorm at Llama 4's hidden size: two reads and two writes of [T, 5120]."""

import pytest
import torch

from aerie.kernels.rms_norm import add_rms_norm, add_rms_norm_ref
from bench.timer import Work

WIDTH, EPS = 5120, 1e-5
PROVIDERS = {"triton": add_rms_norm, "eager": add_rms_norm_ref}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_add_rms_norm(provider, rows, measure, device, dtype):
    x, residual = torch.randn(2, rows, WIDTH, device=device, dtype=dtype)
    weight = torch.ones(WIDTH, device=device, dtype=dtype)
    work = Work(bytes=(4 * rows + 1) * WIDTH * x.element_size())
    measure(provider, work, PROVIDERS[provider], x, residual, weight, EPS)
