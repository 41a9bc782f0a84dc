"""Target probabilities of 8 drafted ids per row: what is gathered is all there is to read."""

import pytest
import torch

from aerie.kernels.row_filter import row_filter_ref
from aerie.kernels.target_probs import target_probs, target_probs_ref
from bench.shapes import FEW_ROWS, V
from bench.timer import Work

PROVIDERS = {"triton": target_probs, "eager": target_probs_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_target_probs(provider, rows, measure, device, dtype):
    logits = torch.randn(rows, V, device=device, dtype=dtype)
    ids = torch.randint(V, (rows, 8), device=device)
    kept = row_filter_ref(logits, torch.ones(rows, device=device))
    # an id, a logit and a probability each, five numbers per row
    work = Work(bytes=ids.numel() * (8 + logits.element_size() + 4) + rows * 20)
    measure(provider, work, PROVIDERS[provider], logits, ids, kept)
