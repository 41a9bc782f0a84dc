"""Greedy walk of one tree and of a batch of 32: a few kilobytes, so the time is all latency."""

import pytest
import torch

from aerie.kernels.accept import accept, accept_ref
from bench.timer import Work

PROVIDERS = {"triton": accept, "eager": accept_ref}


@pytest.mark.parametrize("sequences", [1, 32])
@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_accept(provider, rows, sequences, measure, device):
    chain = torch.arange(rows, device=device).repeat(sequences)  # accepted to its last row
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=device) * rows
    max_path = min(rows, 9)
    work = Work(bytes=8 * sequences * (3 * rows + max_path + 2) + 4 * (sequences + 1))
    measure(provider, work, PROVIDERS[provider], chain, chain - 1, chain + 1, starts, max_path)
