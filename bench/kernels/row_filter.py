"""Top-k and top-p of rows of Llama 4's vocabulary: one read of the logits is the floor."""

import pytest
import torch

from aerie.kernels.row_filter import row_filter, row_filter_ref
from bench.shapes import FEW_ROWS, V
from bench.timer import Work

PROVIDERS = {"triton": row_filter, "eager": row_filter_ref}
FILTERS = {"none": (0, 1.0), "top-k": (50, 1.0), "top-p": (0, 0.95), "both": (50, 0.95)}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_row_filter(provider, filters, rows, measure, device, dtype):
    k, p = FILTERS[filters]
    logits = torch.randn(rows, V, device=device, dtype=dtype) * 3
    temperature, top_p = torch.ones(rows, device=device), torch.full((rows,), p, device=device)
    top_k = torch.full((rows,), k, device=device)
    # two or three settings and five results per row
    work = Work(bytes=logits.numel() * logits.element_size() + rows * (16 + 20))
    measure(provider, work, PROVIDERS[provider], logits, temperature, top_k, top_p)
