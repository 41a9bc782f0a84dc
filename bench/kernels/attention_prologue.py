"""From the packed projection to queries and a written cache, 40 + 8 + 8 heads of 128 (Scout).

A RoPE layer rotates and norms queries and keys, a NoPE layer scales queries. Scattered slots; the
work is one read of the projection and one write of its columns, and the cosines and sines.
"""

import pytest
import torch

from aerie.kernels.attention_prologue import (
    Temperature,
    attention_prologue,
    attention_prologue_ref,
)
from aerie.kernels.rotation import Rotation, inverse_frequencies, rotation_ref
from bench.shapes import FEW_ROWS, G, H, K
from bench.timer import Work

EPS, THETA, PAGES, PAGE_SIZE = 1e-5, 500000.0, 1024, 16


def rope_layer(op):
    def run(qkv, k_cache, v_cache, slots, positions, cos, sin):
        rotation = Rotation(cos, sin)
        return op(qkv, k_cache, v_cache, slots, rotation=rotation, qk_norm_eps=EPS)

    return run


def nope_layer(op):
    def run(qkv, k_cache, v_cache, slots, positions, cos, sin):
        return op(qkv, k_cache, v_cache, slots, temperature=Temperature(positions, 8192.0, 0.1))

    return run


LAYERS = {"rope": rope_layer, "nope": nope_layer}
PROVIDERS = {"triton": attention_prologue, "eager": attention_prologue_ref}


@pytest.mark.parametrize("rows", FEW_ROWS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_attention_prologue(provider, layer, rows, measure, device, dtype):
    qkv = torch.randn(rows, (H + 2 * G) * K, device=device, dtype=dtype)
    caches = torch.zeros(2, PAGES, PAGE_SIZE, G, K, device=device, dtype=dtype)
    slots = torch.randperm(PAGES * PAGE_SIZE, device=device)[:rows]
    positions = torch.randint(8192, (rows,), device=device)
    angles = rotation_ref(positions, inverse_frequencies(K, THETA, None).to(device))
    moved = 2 * qkv.numel() * qkv.element_size() + 16 * rows
    work = Work(bytes=moved + (4 * rows * K if layer == "rope" else 0))
    op = LAYERS[layer](PROVIDERS[provider])
    tables = (slots, positions, angles.cos_TJ, angles.sin_TJ)
    measure(provider, work, op, qkv, caches[0], caches[1], *tables)
