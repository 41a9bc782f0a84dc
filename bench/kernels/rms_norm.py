"""Residual add + RMSNorm at Llama 4's hidden size: two reads and two writes of [T, 5120]."""

import pytest
import torch

from aerie.kernels.rms_norm import add_rms_norm, add_rms_norm_ref
from bench.shapes import FEW_ROWS, D
from bench.timer import Work

EPS = 1e-5
PROVIDERS = {"triton": add_rms_norm, "eager": add_rms_norm_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_add_rms_norm(provider, rows, measure, device, dtype):
    x, residual = torch.randn(2, rows, D, device=device, dtype=dtype)
    weight = torch.randn(D, device=device, dtype=dtype)
    work = Work(bytes=(4 * rows + 1) * D * x.element_size())
    measure(provider, work, PROVIDERS[provider], x, residual, weight, EPS)
