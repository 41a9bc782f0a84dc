"""RoPE and the weightless norm on Llama 4's 40 + 8 heads of 128: one read and one write of each."""

import pytest
import torch

from aerie.kernels.rope import rope, rope_ref
from aerie.kernels.rotation import inverse_frequencies, rotation_ref
from bench.shapes import FEW_ROWS, G, H, K
from bench.timer import Work

EPS, THETA = 1e-5, 500000.0
PROVIDERS = {"triton": rope, "eager": rope_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_rope(provider, rows, measure, device, dtype):
    q = torch.randn(rows, H, K, device=device, dtype=dtype)
    k = torch.randn(rows, G, K, device=device, dtype=dtype)
    inv_freq = inverse_frequencies(K, THETA, None).to(device)
    rotation = rotation_ref(torch.randint(8192, (rows,), device=device), inv_freq)
    work = Work(bytes=2 * rows * (H + G) * K * q.element_size() + 4 * rows * K)
    measure(provider, work, PROVIDERS[provider], q, k, rotation, "interleaved", EPS)
