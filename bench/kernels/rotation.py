"""Angles of Llama 4's 64 rotary pairs: once per step, two float32 writes of [T, 64]."""

import pytest
import torch

from aerie.kernels.rotation import inverse_frequencies, rotation, rotation_ref
from bench.timer import Work

HEAD_DIM, THETA = 128, 500000.0
PROVIDERS = {"triton": rotation, "eager": rotation_ref}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_rotation(provider, rows, measure, device):
    inv_freq = inverse_frequencies(HEAD_DIM, THETA, None).to(device)
    positions = torch.randint(8192, (rows,), device=device)
    work = Work(bytes=8 * rows + 4 * rows * HEAD_DIM)
    measure(provider, work, PROVIDERS[provider], positions, inv_freq)
