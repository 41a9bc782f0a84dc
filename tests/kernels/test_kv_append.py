"""KV append against its reference, bit by bit.

Regimes: rows and widths off the tile and on both sides of its edge, page sizes 1 and 16, padding
rows (negative slots), all rows padding, no rows, column slices of a fused qkv, expanded rows, one
layer of a stacked cache, slots beyond 2^31 elements, NaN in dropped rows, NaN payloads and signed
zeros, writes outside the caches, bad arguments.
"""

import pytest
import torch
from hypothesis import given

from aerie.kernels.kv_append import _kv_append_op, _launch_config, kv_append, kv_append_ref
from tests.evidence import (
    VAST,
    check_compiles,
    edges,
    few_examples,
    guarded,
    laid_out,
    layouts,
    on_gpu,
    same_bits,
    vast,
)

# T rows, G kv heads, K head dimension, C tokens per page
CASES = [
    (1, 1, 1, 1),
    (5, 2, 32, 16),
    (7, 3, 24, 1),
    (17, 1, 100, 4),
    (3, 8, 160, 2),
    (0, 2, 16, 4),
    (15, 1, 128, 4),
    (16, 1, 128, 4),
    (2, 1, 1023, 2),
    (2, 1, 1024, 2),
    (3, 1, 1025, 2),
]
REAL = on_gpu((1, 8, 128, 16), (64, 8, 128, 16), (4096, 8, 128, 16))


def _inputs(rows, heads, head_dim, page_size, device, dtype=torch.float32):
    pages = rows + 2
    k, v = torch.randn(2, rows, heads, head_dim, device=device).to(dtype)
    caches = torch.randn(2, pages, page_size, heads, head_dim, device=device).to(dtype)
    slots = torch.randperm(pages * page_size, device=device)[:rows]
    return k, v, caches, slots


def _check(k, v, caches, slots):
    in_place, check = guarded(caches.shape, caches.dtype, caches.device)
    in_place.copy_(caches)
    kv_append(k, v, in_place[0], in_place[1], slots)
    kv_append_ref(k, v, caches[0], caches[1], slots)
    assert same_bits(in_place, caches)
    check()


@few_examples
@given(edges(16, 20), edges(2, 3), edges(16, 20), layouts())
def test_any_shape_and_layout(device, rows, heads, head_dim, layout):
    torch.manual_seed(rows)
    k, v, caches, slots = _inputs(rows, heads, head_dim, 4, device)
    _check(laid_out(k, layout), laid_out(v, layout), caches, slots)


def test_slot_beyond_32_bit_offsets(device):
    k, v, *_ = _inputs(2, 1, 16, 4, device, torch.float16)
    cache = vast(128, torch.float16, device)[: VAST + 128].view(-1, 4, 1, 16)
    last = 4 * len(cache) - 1
    kv_append(k, v, cache, cache, torch.tensor([last, 2], device=device))
    assert same_bits(cache.view(-1, 1, 16)[[last, 2]], v)


def test_every_bit_is_kept(device):
    bits = torch.tensor([0x8000, 0x7E01, 0xFDFF, 0x0001], device=device).to(torch.uint16)
    k = bits.view(torch.float16).repeat(4).view(1, 1, 16)
    _, _, caches, _ = _inputs(1, 1, 16, 4, device, torch.float16)
    kv_append(k, -k, caches[0], caches[1], torch.tensor([5], device=device))
    assert same_bits(caches[0].flatten(0, 1)[[5]], k)
    assert same_bits(caches[1].flatten(0, 1)[[5]], -k)


@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_ref(case, device, dtypes):
    for dtype in dtypes:
        k, v, caches, slots = _inputs(*case, device, dtype)
        _check(k, v, caches, slots)
        assert torch.equal(caches[0].flatten(0, 1)[slots], k)
        assert torch.equal(caches[1].flatten(0, 1)[slots], v)


@pytest.mark.parametrize("padding", [[0], [1, 4], [0, 1, 2, 3, 4]], ids=str)
def test_negative_slots_are_dropped(padding, device):
    k, v, caches, slots = _inputs(5, 2, 16, 4, device)
    k[padding], v[padding], slots[padding] = torch.nan, torch.nan, -1
    _check(k, v, caches, slots)
    assert caches.isfinite().all()


def test_strided_rows(device):
    qkv = torch.randn(5, 7, 32, device=device)
    _, _, caches, slots = _inputs(5, 2, 32, 4, device)
    _check(qkv[:, 3:5], qkv[:, 5:7], caches, slots)
    _check(qkv[:, ::2][:, :2], qkv[:, 1::2][:, :2], caches, slots)
    _check(qkv[:1, :2].expand(5, 2, 32), qkv[:, :1].expand(5, 2, 32), caches, slots)


def test_layer_of_a_stacked_cache(device):
    k, v, _, slots = _inputs(3, 2, 16, 4, device)
    stacked = torch.zeros(2, 3, 5, 4, 2, 16, device=device)
    kv_append(k, v, stacked[0, 1], stacked[1, 1], slots)
    assert torch.equal(stacked[0, 1].flatten(0, 1)[slots], k)
    assert stacked[:, [0, 2]].count_nonzero() == 0


def test_compiles_once_for_all_row_counts(device):
    k, v, caches, slots = _inputs(5, 2, 16, 4, device)

    def append(k, v, slots):
        kv_append(k, v, caches[0], caches[1], slots)
        return caches

    check_compiles(append, k[:2], v[:2], slots[:2], again=(k, v, slots))


def test_opcheck(device):
    k, v, caches, slots = _inputs(3, 2, 16, 4, device)
    torch.library.opcheck(_kv_append_op, (k, v, caches[0], caches[1], slots))


def test_rejects_bad_arguments(device):
    k, v, (k_cache, v_cache), slots = _inputs(3, 2, 16, 4, device)
    with pytest.raises(ValueError, match="k_cache_RCGK: must be a contiguous"):
        kv_append(k, v, k_cache.transpose(0, 1), v_cache, slots)
    with pytest.raises(ValueError, match="v_TGK: must be .* with the heads of the cache"):
        kv_append(k, v[:, :1], k_cache, v_cache, slots)
    with pytest.raises(ValueError, match="k_TGK: must have a contiguous last dimension"):
        kv_append(k.half(), v, k_cache, v_cache, slots)
    with pytest.raises(ValueError, match="must have the 3 rows of k_TGK"):
        kv_append(k, v, k_cache, v_cache, slots[:2])
    with pytest.raises(ValueError, match="slots_T: must be contiguous int64"):
        kv_append(k, v, k_cache, v_cache, slots[:1].expand(3))
    with pytest.raises(ValueError, match="slots_T: must be contiguous int64"):
        kv_append(k, v, k_cache, v_cache, slots.int())


def test_rejects_caches_of_two_sizes(device):
    k, v, (k_cache, v_cache), slots = _inputs(3, 2, 16, 4, device)
    with pytest.raises(ValueError, match="v_cache_RCGK: must be"):
        kv_append(k, v, k_cache, v_cache[:1], slots)


@pytest.mark.parametrize("width", [1, 63, 1024, 5000])
def test_launch_config(width):
    config = _launch_config(width)
    assert 1 <= config.BLOCK_T <= 16
    assert 1 <= config.BLOCK_W <= 1024
