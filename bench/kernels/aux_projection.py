"""EAGLE-3's fusion of three taps of 5120 to 5120: the weight is nearly all of the bytes."""

import pytest
import torch

from aerie.kernels.aux_projection import aux_projection, aux_projection_ref
from bench.timer import Work

TAPS, WIDTH = 3, 5120
PROVIDERS = {"triton": aux_projection, "eager": aux_projection_ref}


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_aux_projection(provider, rows, measure, device, dtype):
    taps = list(torch.randn(TAPS, rows, WIDTH, device=device, dtype=dtype))
    weight = torch.randn(WIDTH, TAPS * WIDTH, device=device, dtype=dtype)
    elements = weight.numel() + (TAPS + 1) * rows * WIDTH
    work = Work(bytes=elements * weight.element_size(), flops=2 * rows * weight.numel())
    measure(provider, work, PROVIDERS[provider], taps, weight)
