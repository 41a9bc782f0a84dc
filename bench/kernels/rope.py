"""RoPE and the weightless norm on Llama 4's 40 + 8 heads of 128: one read and one write of each."""

import pytest
import torch

from aerie.kernels.rope import rope, rope_ref
from aerie.kernels.rotation import inverse_frequencies, rotation_ref
from bench.timer import Work

HEADS, KV_HEADS, HEAD_DIM, EPS = 40, 8, 128, 1e-5
PROVIDERS = {"triton": rope, "eager": rope_ref}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_rope(provider, rows, measure, device, dtype):
    q = torch.randn(rows, HEADS, HEAD_DIM, device=device, dtype=dtype)
    k = torch.randn(rows, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    inv_freq = inverse_frequencies(HEAD_DIM, 500000.0, None).to(device)
    rotation = rotation_ref(torch.randint(8192, (rows,), device=device), inv_freq)
    heads = 2 * rows * (HEADS + KV_HEADS) * HEAD_DIM * q.element_size()
    work = Work(bytes=heads + 4 * rows * HEAD_DIM)
    measure(provider, work, PROVIDERS[provider], q, k, rotation, "interleaved", EPS)
