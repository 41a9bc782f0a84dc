"""Draft head of 32000 x 5120 with its top k: the weights are nearly all of the bytes."""

import pytest
import torch

from aerie.kernels.draft_vocab import draft_vocab, draft_vocab_ref
from bench.timer import Work

WIDTH, VOCABULARY = 5120, 32000
PROVIDERS = {"triton": draft_vocab, "eager": draft_vocab_ref}


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (1, 4), (4, 4), (16, 8), (10, 10), (64, 1)])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_draft_vocab(provider, rows, k, measure, device, dtype):
    hidden = torch.randn(rows, WIDTH, device=device, dtype=dtype)
    head = torch.randn(VOCABULARY, WIDTH, device=device, dtype=dtype)
    d2t = torch.arange(VOCABULARY, device=device)
    weights = (VOCABULARY + rows) * WIDTH * hidden.element_size()
    # an id and a log-probability per kept token, a logsumexp per row
    work = Work(bytes=weights + rows * (12 * k + 4), flops=2 * rows * WIDTH * VOCABULARY)
    measure(provider, work, PROVIDERS[provider], hidden, head, d2t, k)
