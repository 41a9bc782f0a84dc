"""Cache commit against its reference, and both against a move through a copy.

Regimes: a path whose later targets are earlier sources (in-place order), a chain (nothing moves),
several sequences on interleaved pages, skipped pairs, FP8 codes, one pair, no pair, widths off a
power of two and on both sides of a tile, layers with a gap between them, slots and layers beyond
2^31 elements, writes outside the caches, bad arguments.
"""

import pytest
import torch

from aerie.kernels.cache_commit import (
    _cache_commit_op,
    _launch_config,
    cache_commit,
    cache_commit_ref,
)
from tests.evidence import VAST, check_compiles, guarded, on_gpu, same_bits, vast

PATHS = {  # rows of a tree along a path, root first; -1 pads
    "overlapping": [0, 3, 4, 5, 9, 11],
    "chain": [0, 1, 2, 3],
    "root only": [0],
    "last rows": [0, 14, 15],
    "padded": [0, 2, 5, -1, -1],
    "none": [],
}


def _caches(device, layers=3, heads=2, head_dim=24, dtype=torch.float32):
    return torch.randn(2, layers, 6, 4, heads, head_dim, device=device).to(dtype)


def _check(caches, source, target):
    expected, by_ref = caches.clone(), caches.clone()
    kept = source >= 0
    flat = expected.flatten(2, 3)
    flat[:, :, target[kept]] = flat[:, :, source[kept]].clone()
    in_place, check = guarded(caches.shape, caches.dtype, caches.device)
    in_place.copy_(caches)
    cache_commit(in_place[0], in_place[1], source, target)
    cache_commit_ref(by_ref[0], by_ref[1], source, target)
    assert same_bits(in_place, expected)
    assert same_bits(by_ref, expected)
    check()


def _slots(logical, page_table, device):
    """Flat slots of logical ones on pages of 4; negative ones stay negative."""
    return torch.tensor(
        [-1 if s < 0 else page_table[s // 4] * 4 + s % 4 for s in logical],
        dtype=torch.int64,
        device=device,
    )


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_matches_ref(path, device, dtypes):
    prefix, page_table = 3, [4, 0, 5, 2, 1]
    source = _slots([row if row < 0 else prefix + row for row in path], page_table, device)
    target = _slots([-1 if r < 0 else prefix + p for p, r in enumerate(path)], page_table, device)
    for dtype in dtypes:
        _check(_caches(device, dtype=dtype), source, target)


def test_fp8_codes_are_moved_as_bytes(device):
    codes = torch.randint(256, (2, 3, 6, 4, 2, 24), dtype=torch.uint8, device=device)
    source = torch.tensor([3, 7, 9, 20], device=device)
    target = torch.tensor([3, 4, 7, 9], device=device)
    expected, by_ref = codes.clone(), codes.clone()
    expected.flatten(2, 3)[:, :, target] = codes.flatten(2, 3)[:, :, source]
    cache_commit(*codes.view(torch.float8_e4m3fn), source, target)
    cache_commit_ref(*by_ref.view(torch.float8_e4m3fn), source, target)
    assert same_bits(codes, expected)
    assert same_bits(by_ref, expected)


def test_one_negative_side_skips_the_pair(device):
    caches = _caches(device)
    before = caches.clone()
    source, target = torch.tensor([3, -1], device=device), torch.tensor([-1, 2], device=device)
    cache_commit(caches[0], caches[1], source, target)
    cache_commit_ref(caches[0], caches[1], source, target)
    assert torch.equal(caches, before)


def test_several_sequences(device):
    tables, prefixes, path = ([0, 2, 4], [5, 3, 1]), (1, 6), [0, 2, 3, 5]
    source = [
        _slots([n + r for r in path], t, device) for n, t in zip(prefixes, tables, strict=True)
    ]
    target = [_slots(range(n, n + 4), t, device) for n, t in zip(prefixes, tables, strict=True)]
    _check(_caches(device), torch.cat(source), torch.cat(target))


@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 5), (1, 1023), (1, 1024), (1, 1025), (8, 160), *on_gpu((8, 128))], ids=str
)
def test_widths(heads, device):
    source, target = torch.tensor([1, 5, 7], device=device), torch.tensor([1, 2, 3], device=device)
    _check(_caches(device, 1, *heads), source, target)


@pytest.mark.parametrize("layer", [0, 2])
def test_slots_beyond_32_bit_offsets(layer, device):
    """From a slot past 2^31 elements (or one of a layer past them) to slot 1 and back."""
    pages = 2 if layer else VAST // 64 + 1  # of 4 slots of 16 elements each
    stride = VAST // 2 if layer else 64 * pages
    cache = vast(64 * (pages + 2), torch.float16, device).as_strided(
        (layer + 1, pages, 4, 1, 16), (stride, 64, 16, 16, 1)
    )
    slots = cache[layer].view(-1, 16)
    far = 4 * pages - 2
    for value, (source, target) in enumerate(((far, 1), (1, far)), start=3):
        slots[source] = value
        source, target = (torch.tensor([x], device=device) for x in (source, target))
        cache_commit(cache, cache, source, target)
        assert slots[target].unique().tolist() == [value]


def test_layers_with_a_gap(device):
    wide = torch.randn(2, 4, 6, 4, 2, 16, device=device)
    before = wide.clone()
    source, target = torch.tensor([9, 12], device=device), torch.tensor([8, 9], device=device)
    cache_commit(wide[0, ::2], wide[1, ::2], source, target)
    assert torch.equal(wide[:, 1::2], before[:, 1::2])
    assert torch.equal(wide.flatten(2, 3)[:, ::2, [8, 9]], before.flatten(2, 3)[:, ::2, [9, 12]])


def test_nan_moves_only_with_its_slot(device):
    caches = _caches(device)
    caches.flatten(2, 3)[:, :, 20] = torch.nan
    source, target = torch.tensor([10, 12], device=device), torch.tensor([8, 9], device=device)
    cache_commit(caches[0], caches[1], source, target)
    assert caches.flatten(2, 3).isnan().any(dim=(0, 1, 3, 4)).nonzero().flatten().tolist() == [20]


def test_compiles_once_for_all_path_lengths(device):
    caches, slots = _caches(device), torch.arange(8, device=device)

    def commit(source, target):
        cache_commit(caches[0], caches[1], source, target)
        return caches

    check_compiles(commit, slots[2:4], slots[:2], again=(slots[3:], slots[:5]))


def test_opcheck(device):
    caches = _caches(device)
    source, target = torch.tensor([3, 6], device=device), torch.tensor([1, 3], device=device)
    torch.library.opcheck(_cache_commit_op, (caches[0], caches[1], source, target))


def test_rejects_bad_arguments(device):
    k_cache, v_cache = _caches(device)
    slots = torch.tensor([1, 2], device=device)
    with pytest.raises(ValueError, match="k_cache_LRCGK: must be .* with contiguous layers"):
        cache_commit(k_cache.transpose(1, 2), v_cache, slots, slots)
    with pytest.raises(ValueError, match="v_cache_LRCGK: must be"):
        cache_commit(k_cache, v_cache[:, :2], slots, slots)
    with pytest.raises(ValueError, match="source_slots_P: must be a contiguous int64"):
        cache_commit(k_cache, v_cache, slots.int(), slots)
    with pytest.raises(ValueError, match="target_slots_P: must be a contiguous int64"):
        cache_commit(k_cache, v_cache, slots, slots[:1].expand(2))
    with pytest.raises(ValueError, match="target_slots_P: must have the 2 entries"):
        cache_commit(k_cache, v_cache, slots, slots[:1])


def test_rejects_caches_of_two_dtypes(device):
    caches, slots = _caches(device), torch.tensor([1], device=device)
    with pytest.raises(ValueError, match="v_cache_LRCGK: must be"):
        cache_commit(caches[0], caches[1].half(), slots, slots)


@pytest.mark.parametrize("width", [1, 63, 1024, 5000])
def test_launch_config(width):
    assert 1 <= _launch_config(width).BLOCK_W <= 1024
