"""SwiGLU at the width of a Llama 4 expert: two reads and one write of [T, 8192]."""

import pytest
import torch

from aerie.kernels.swiglu import swiglu, swiglu_ref
from bench.shapes import FEW_ROWS
from bench.timer import Work

WIDTH = 8192
PROVIDERS = {"triton": swiglu, "eager": swiglu_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_swiglu(provider, rows, measure, device, dtype):
    gate, up = torch.randn(rows, 2 * WIDTH, device=device, dtype=dtype).chunk(2, dim=-1)
    work = Work(bytes=3 * rows * WIDTH * gate.element_size())
    measure(provider, work, PROVIDERS[provider], gate, up)
