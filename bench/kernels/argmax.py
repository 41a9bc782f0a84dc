"""Greedy choice over Llama 4's 202048 logits: every logit is read once."""

import pytest
import torch

from aerie.kernels.argmax import argmax, argmax_ref
from bench.shapes import FEW_ROWS, V
from bench.timer import Work

PROVIDERS = {"triton": argmax, "eager": argmax_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_argmax(provider, rows, measure, device, dtype):
    logits = torch.randn(rows, V, device=device, dtype=dtype)
    work = Work(bytes=rows * V * logits.element_size() + 8 * rows)
    measure(provider, work, PROVIDERS[provider], logits)
