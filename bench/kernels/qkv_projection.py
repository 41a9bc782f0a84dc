"""The draft layer's attention input, 2 x 5120 to 7168: the weights are nearly all of the bytes."""

import pytest
import torch

from aerie.kernels.qkv_projection import qkv_projection, qkv_projection_ref
from bench.shapes import features_of
from bench.timer import Work

WIDTH, FEATURES, TABLE_ROWS = 5120, 7168, 1024
PROVIDERS = {"triton": qkv_projection, "eager": qkv_projection_ref}


@pytest.mark.parametrize("weight_dtype", ["dtype", "fp8"])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_qkv_projection(provider, rows, weight_dtype, measure, device, dtype):
    ids = torch.randint(0, TABLE_ROWS, (rows,), device=device)
    table = torch.randn(TABLE_ROWS, WIDTH, device=device, dtype=dtype)
    hidden, gain = torch.randn(rows, WIDTH, device=device, dtype=dtype), table[0].abs()
    features = features_of(FEATURES, weight_dtype)
    weight = torch.randn(features, 2 * WIDTH, device=device, dtype=dtype)
    scale = None
    if weight_dtype == "fp8":
        weight = weight.to(torch.float8_e4m3fn)
        scale = torch.rand(features, device=device)
    moved = rows * (2 * WIDTH + features) * hidden.element_size()
    size = weight.numel() * weight.element_size()
    work = Work(bytes=size + moved, flops=2 * rows * weight.numel())
    arguments = (ids, table, hidden, gain, gain, 1e-5, weight, scale)
    measure(provider, work, PROVIDERS[provider], *arguments)
