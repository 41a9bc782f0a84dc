"""Row gather at Llama 4's hidden size: one read and one write of [T, 5120].

The table is a 16384-row cut of the vocabulary: the bytes moved do not depend on its height.
"""

import pytest
import torch

from aerie.kernels.embedding import embedding, embedding_ref
from bench.timer import Work

VOCABULARY, WIDTH = 16384, 5120
PROVIDERS = {"triton": embedding, "eager": embedding_ref}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_embedding(provider, rows, measure, device, dtype):
    weight = torch.zeros(VOCABULARY, WIDTH, device=device, dtype=dtype)
    ids = torch.randint(VOCABULARY, (rows,), device=device)
    work = Work(bytes=2 * rows * WIDTH * weight.element_size())
    measure(provider, work, PROVIDERS[provider], ids, weight)
