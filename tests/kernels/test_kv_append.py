"""KV append against its reference, bit by bit.

Regimes: rows off the tile, widths off a power of two and wider than a tile, page sizes 1 and 16,
padding rows (negative slots), all rows padding, no rows, column slices of a fused qkv, one layer of
a stacked cache, NaN in dropped rows, bad arguments.
"""

import pytest
import torch

from aerie.kernels.kv_append import _kv_append_op, _launch_config, kv_append, kv_append_ref

# T rows, G kv heads, K head dimension, C tokens per page
CASES = [
    (1, 1, 1, 1),
    (5, 2, 32, 16),
    (7, 3, 24, 1),
    (17, 1, 100, 4),
    (3, 8, 160, 2),
    (0, 2, 16, 4),
]


def _inputs(rows, heads, head_dim, page_size, device, dtype=torch.float32):
    pages = rows + 2
    k, v = torch.randn(2, rows, heads, head_dim, device=device).to(dtype)
    caches = torch.randn(2, pages, page_size, heads, head_dim, device=device).to(dtype)
    slots = torch.randperm(pages * page_size, device=device)[:rows]
    return k, v, caches, slots


def _check(k, v, caches, slots):
    expected = caches.clone()
    kv_append(k, v, caches[0], caches[1], slots)
    kv_append_ref(k, v, expected[0], expected[1], slots)
    assert torch.equal(caches, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
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


def test_layer_of_a_stacked_cache(device):
    k, v, _, slots = _inputs(3, 2, 16, 4, device)
    stacked = torch.zeros(2, 3, 5, 4, 2, 16, device=device)
    kv_append(k, v, stacked[0, 1], stacked[1, 1], slots)
    assert torch.equal(stacked[0, 1].flatten(0, 1)[slots], k)
    assert stacked[:, [0, 2]].count_nonzero() == 0


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
        kv_append(k, v, k_cache, v_cache, slots.int())


@pytest.mark.parametrize("width", [1, 63, 1024, 5000])
def test_launch_config(width):
    config = _launch_config(width)
    assert 1 <= config.BLOCK_T <= 16
    assert 1 <= config.BLOCK_W <= 1024
