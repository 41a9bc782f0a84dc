"""EAGLE-3's fusion of three taps of 5120 to 5120: the weight is nearly all of the bytes."""

import pytest
import torch

from aerie.kernels.aux_projection import JointNorm, TapNorm, aux_projection, aux_projection_ref
from bench.shapes import features_of
from bench.timer import Work

TAPS, WIDTH = 3, 5120


def _triton(taps, weight, norm, scale):
    return aux_projection(taps, weight, norm=norm, scale_F=scale)


def _eager(taps, weight, norm, scale):
    return aux_projection_ref(taps, weight, norm=norm, scale_F=scale)


PROVIDERS = {"triton": _triton, "eager": _eager}


@pytest.mark.parametrize(
    ("norm", "weight_dtype"),
    [("none", "dtype"), ("none", "fp8"), ("tap", "dtype"), ("joint", "fp8")],
)
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_aux_projection(provider, rows, norm, weight_dtype, measure, device, dtype):
    taps = list(torch.randn(TAPS, rows, WIDTH, device=device, dtype=dtype))
    features = features_of(WIDTH, weight_dtype)
    weight = torch.randn(features, TAPS * WIDTH, device=device, dtype=dtype)
    gain = torch.rand(TAPS * WIDTH, device=device, dtype=dtype)
    norms = {"none": None, "tap": TapNorm(gain.split(WIDTH), 1e-5), "joint": JointNorm(gain, 1e-5)}
    scale = None
    if weight_dtype == "fp8":
        weight, scale = weight.to(torch.float8_e4m3fn), torch.rand(features, device=device)
    moved = rows * (TAPS * WIDTH + features) * taps[0].element_size()
    size = weight.numel() * weight.element_size()
    work = Work(bytes=size + moved, flops=2 * rows * weight.numel())
    measure(provider, work, PROVIDERS[provider], taps, weight, norms[norm], scale)
