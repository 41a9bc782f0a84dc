"""Moving an accepted path through all 48 layers of a cache of 8 heads of 128: read and write."""

import pytest
import torch

from aerie.kernels.cache_commit import cache_commit, cache_commit_ref
from bench.shapes import G, K, L
from bench.timer import Work

PAGES, PAGE_SIZE = 16, 16
PROVIDERS = {"triton": cache_commit, "eager": cache_commit_ref}


@pytest.mark.parametrize("moved", [1, 4, 8])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_cache_commit(provider, moved, measure, device, dtype):
    caches = torch.randn(2, L, PAGES, PAGE_SIZE, G, K, device=device, dtype=dtype)
    source = 100 + 3 * torch.arange(1, moved + 1, device=device)
    target = 100 + torch.arange(1, moved + 1, device=device)
    work = Work(bytes=4 * moved * L * G * K * caches.element_size())
    measure(provider, work, PROVIDERS[provider], caches[0], caches[1], source, target)
