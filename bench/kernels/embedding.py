"""Row gather at Llama 4's hidden size: one read and one write of [T, 5120].

A CPU gets a 16384-row cut of the vocabulary: the bytes moved do not depend on the table's height.
"""

import pytest
import torch

from aerie.kernels.embedding import embedding, embedding_ref
from bench.shapes import FEW_ROWS, ON_GPU, D, V
from bench.timer import Work

HEIGHT = V if ON_GPU else 16384
PROVIDERS = {"triton": embedding, "eager": embedding_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_embedding(provider, rows, measure, device, dtype):
    weight = torch.randn(HEIGHT, D, device=device, dtype=dtype)
    ids = torch.randint(HEIGHT, (rows,), device=device)
    work = Work(bytes=2 * rows * D * weight.element_size() + 8 * rows)
    measure(provider, work, PROVIDERS[provider], ids, weight)
