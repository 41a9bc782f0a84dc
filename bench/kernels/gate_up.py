"""The draft's gate and up projections with SwiGLU, 5120 to 2 x 8192: the weights are the bytes."""

import pytest
import torch

from aerie.kernels.gate_up import gate_up, gate_up_ref
from bench.shapes import features_of
from bench.timer import Work

DEPTH, WIDTH = 5120, 8192


def _triton(x, weight, scale):
    return gate_up(x, weight, scale=scale)


def _eager(x, weight, scale):
    return gate_up_ref(x, weight, scale=scale)


PROVIDERS = {"triton": _triton, "eager": _eager}


@pytest.mark.parametrize("weight_dtype", ["dtype", "fp8"])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_gate_up(provider, rows, weight_dtype, measure, device, dtype):
    x = torch.randn(rows, DEPTH, device=device, dtype=dtype)
    width = features_of(WIDTH, weight_dtype)
    weight = torch.randn(2 * width, DEPTH, device=device, dtype=dtype)
    scale = None
    if weight_dtype == "fp8":
        weight = weight.to(torch.float8_e4m3fn)
        scale = torch.rand(2 * width, device=device)
    moved = rows * (DEPTH + width) * x.element_size()
    size = weight.numel() * weight.element_size()
    work = Work(bytes=size + moved, flops=2 * rows * weight.numel())
    measure(provider, work, PROVIDERS[provider], x, weight, scale)
