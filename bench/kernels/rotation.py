"""Angles of Llama 4's 64 rotary pairs: once per step, two float32 writes of [T, 64]."""

import pytest
import torch

from aerie.kernels.rotation import inverse_frequencies, rotation, rotation_ref
from bench.shapes import FEW_ROWS, K
from bench.timer import Work

THETA = 500000.0
PROVIDERS = {"triton": rotation, "eager": rotation_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_rotation(provider, rows, measure, device):
    inv_freq = inverse_frequencies(K, THETA, None).to(device)
    positions = torch.randint(8192, (rows,), device=device)
    work = Work(bytes=8 * rows + 4 * rows * K + 2 * K)
    measure(provider, work, PROVIDERS[provider], positions, inv_freq)
