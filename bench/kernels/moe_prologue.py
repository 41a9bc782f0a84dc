"""Residual add, norm, router and FP8 codes before Scout's 16 and Maverick's 128 experts.

Bytes are those of the rows and of the router's weights, once; the goal is 4 us for up to 64 rows.
"""

import pytest
import torch

from aerie.kernels.moe_prologue import moe_prologue, moe_prologue_ref
from bench.shapes import FEW_ROWS, D
from bench.timer import Work

PROVIDERS = {"triton": moe_prologue, "eager": moe_prologue_ref}


@pytest.mark.parametrize("codes", ["none", "row"])
@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("experts", [16, 128])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_moe_prologue(provider, experts, rows, codes, measure, device, dtype):
    x, residual = torch.randn(2, rows, D, device=device, dtype=dtype)
    gain = torch.ones(D, device=device, dtype=dtype)
    router = torch.randn(experts, D, device=device, dtype=dtype).mul_(D**-0.5)
    moved = 4 * rows * D * x.element_size() + (rows * D if codes == "row" else 0)
    size = experts * D * x.element_size()
    work = Work(bytes=moved + size, flops=2 * rows * experts * D)
    arguments = x, residual, gain, 1e-5, router, 1, codes
    measure(provider, work, PROVIDERS[provider], *arguments)
