"""Draws from rows of Llama 4's vocabulary, filtered before: one read of the logits is the floor."""

import pytest
import torch

from aerie.kernels.draw import draw, draw_ref
from aerie.kernels.row_filter import row_filter_ref
from bench.shapes import FEW_ROWS, V
from bench.timer import Work

PROVIDERS = {"triton": draw, "eager": draw_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_draw(provider, rows, measure, device, dtype):
    logits = torch.randn(rows, V, device=device, dtype=dtype) * 3
    kept = row_filter_ref(logits, torch.ones(rows, device=device))
    seeds = torch.arange(rows, device=device)
    # five numbers, seed and position per row, one key per block of 4096 ids twice, the id
    work = Work(bytes=logits.numel() * logits.element_size() + rows * (20 + 16 + 2 * 8 * 50 + 8))
    measure(provider, work, PROVIDERS[provider], logits, kept, seeds, seeds + 100)
