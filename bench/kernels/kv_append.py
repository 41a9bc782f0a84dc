"""Writing the keys and values of a step, 8 heads of 128, to scattered slots of the cache."""

import pytest
import torch

from aerie.kernels.kv_append import kv_append, kv_append_ref
from bench.shapes import FEW_ROWS, G, K
from bench.timer import Work

PAGES, PAGE_SIZE = 1024, 16
PROVIDERS = {"triton": kv_append, "eager": kv_append_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_kv_append(provider, rows, measure, device, dtype):
    k, v = torch.randn(2, rows, G, K, device=device, dtype=dtype)
    caches = torch.zeros(2, PAGES, PAGE_SIZE, G, K, device=device, dtype=dtype)
    slots = torch.randperm(PAGES * PAGE_SIZE, device=device)[:rows]
    work = Work(bytes=4 * rows * G * K * k.element_size() + 8 * rows)
    measure(provider, work, PROVIDERS[provider], k, v, caches[0], caches[1], slots)
