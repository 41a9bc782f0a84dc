"""Full draft logits over a head of 32000 x 5120: sampled drafts at few rows, training at many."""

import pytest
import torch

from aerie.kernels.draft_logits import draft_logits, draft_logits_ref
from bench.shapes import ON_GPU, ROWS, D
from bench.timer import Work

VOCABULARY = 32000 if ON_GPU else 4000
PROVIDERS = {"triton": draft_logits, "eager": draft_logits_ref}


@pytest.mark.parametrize("rows", [*ROWS, 2048] if ON_GPU else ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_draft_logits(provider, rows, measure, device, dtype):
    hidden = torch.randn(rows, D, device=device, dtype=dtype)
    head = torch.randn(VOCABULARY, D, device=device, dtype=dtype)
    elements = (VOCABULARY + rows) * D + rows * VOCABULARY
    work = Work(bytes=elements * hidden.element_size(), flops=2 * rows * D * VOCABULARY)
    measure(provider, work, PROVIDERS[provider], hidden, head)
