"""Tree attention with its keys split, FP8 caches, rows apart from each other, and what it reads.

Regimes: every tree shape against a float64 statement of the rules; pages of 1, 16 and 64 tokens;
prefixes of 0 to several pages and splits of 1 to 8 with shares that stay empty; a chunk edge in the
prefix, in the tree and at the boundary; ratios 1 to 8; a tree's paths against chains and a chain
with words against one without; a batch against each of its sequences alone; FP8 codes with scales
per tensor and per head and queries near the top of their range; NaN, infinities of both signs in
keys and values that some rows of a tile see and others not; pages that no row may look up; the
bytes of keys and values that are read, counted; a prompt's memory; the rule of the split; replays
of a captured graph; bad arguments.
"""

from dataclasses import replace

import pytest
import torch

from aerie.kernels.target import AMPERE, BLACKWELL, HOPPER, MI300
from aerie.kernels.tree_attention import (
    TreeRows,
    _launch_config,
    _tree_attention_op,
    tree_attention,
    tree_attention_ref,
)
from aerie.kernels.tree_attention_splits import MAX_SPLITS, kv_bytes_read, split_count
from tests.evidence import assert_as_accurate, check_compiles, exact, run_guarded, same_bits

INT_MAX = 2**31 - 1
FP8 = torch.float8_e4m3fn
SCALE = 0.3
TREES = {  # of 13 rows
    "chain": list(range(-1, 12)),
    "star": [-1] + [0] * 12,
    "k-ary": [-1] + [(n - 1) // 3 for n in range(1, 13)],
    "random": [-1, 0, 0, 2, 1, 4, 2, 2, 7, 0, 8, 10, 10],
}


def _case(trees, prefixes, device, *, page_size=16, heads=(2, 1), head_dim=16, **extra):
    """q, caches and rows; unused slots hold NaN and unused table entries `INT_MAX`.

    `extra`: dtype, `chains` for rows without words, `spare` for unused pages of the table.
    """
    dtype, spare = extra.get("dtype", torch.float32), extra.get("spare", 1)
    used = [prefix + len(tree) for prefix, tree in zip(prefixes, trees, strict=True)]
    pages = [-(-slots // page_size) for slots in used]
    table = torch.full((len(trees), max(pages) + spare), INT_MAX, dtype=torch.int32)
    pool = torch.randperm(sum(pages) + 1).int()
    caches = torch.full((2, len(pool), page_size, heads[1], head_dim), torch.nan)
    for b, (slots, count) in enumerate(zip(used, pages, strict=True)):
        first = sum(pages[:b])
        table[b, :count] = pool[first : first + count]
        s = torch.arange(slots)
        caches[:, table[b, s // page_size].long(), s % page_size] = torch.randn(
            2, slots, heads[1], head_dim
        )
    sets = [_ancestors(tree) for tree in trees]
    depths = [len(a) - 1 for s in sets for a in s]
    words = torch.tensor([0 if extra.get("chains") else _word(a) for s in sets for a in s])
    starts = torch.tensor([0, *map(len, trees)]).cumsum(0).int()
    base = torch.tensor([p for p, tree in zip(prefixes, trees, strict=True) for _ in tree])
    rows = TreeRows(
        positions_T=(base + torch.tensor(depths)).to(device),
        row_starts_B1=starts.to(device),
        prefix_lengths_B=torch.tensor(prefixes, dtype=torch.int32, device=device),
        page_table_BM=table.to(device),
        ancestors_T=None if extra.get("chains") else words.to(device),
        max_rows=max(map(len, trees)),
    )
    q = torch.randn(len(depths), heads[0], head_dim).to(device, dtype)
    return q, *caches.to(device, dtype), rows


def _ancestors(parents):
    sets = []
    for row, parent in enumerate(parents):
        sets.append({row} | (sets[parent] if parent >= 0 else set()))
    return sets


def _word(ancestors):
    word = sum(1 << j for j in ancestors)
    return word - 2**64 if word >= 2**63 else word


def _dense(q, k_cache, v_cache, rows, chunk_size, trees):
    """The rules, row by row, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    page_size, ratio = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for b, tree in enumerate(trees):
        prefix, start = int(rows.prefix_lengths_B[b]), int(rows.row_starts_B1[b])
        depths = [len(a) - 1 for a in _ancestors(tree)]
        at = torch.tensor([*range(prefix), *(prefix + depth for depth in depths)])
        for i, ancestors in enumerate(_ancestors(tree)):
            seen = torch.tensor([*range(prefix), *(prefix + j for j in sorted(ancestors))])
            if chunk_size is not None:
                seen = seen[at[seen] // chunk_size == (prefix + depths[i]) // chunk_size]
            pages = rows.page_table_BM[b, seen // page_size].long()
            k, v = (c[pages, seen % page_size].cpu().double() for c in (k_cache, v_cache))
            k, v = k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1)
            scores = torch.einsum("hk,shk->hs", q[start + i].cpu().double(), k) * SCALE
            out[start + i] = torch.einsum("hs,shk->hk", scores.softmax(1), v)
    return out.to(q.device)


def _check(case, chunk_size, trees, runs=1, **named):
    dense = _dense(*case, chunk_size, trees)
    eager = tree_attention_ref(*case, chunk_size, SCALE)

    def attend(*arguments):
        return tree_attention(*arguments, chunk_size, SCALE, **named)

    assert_as_accurate(run_guarded(attend, *case, runs=runs), dense, eager)


@pytest.mark.parametrize("shape", TREES)
def test_tree_shapes(shape, device, dtypes):
    for dtype in dtypes if shape == "random" else dtypes[1:]:
        case = _case([TREES[shape]], [70], device, heads=(3, 1), dtype=dtype)
        _check(case, None, [TREES[shape]], num_splits=2)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("prefix", [0, 63, 64, 200])
def test_pages_and_prefixes(page_size, prefix, device):
    trees = [TREES["random"]]
    case = _case(trees, [prefix], device, page_size=page_size)
    _check(case, None, trees, num_splits=2)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 8])
def test_splits_agree(splits, device):
    """4 to 5 tiles of keys and up to 8 shares: some stay empty, as in the short sequences."""
    trees = [TREES["k-ary"][:7], [], [-1], TREES["star"][:3]]
    case = _case(trees, [140, 5, 0, 65], device)
    _check(case, (None, 100)[splits % 2], trees, runs=2, num_splits=splits)


@pytest.mark.parametrize("prefix", [58, 60, 62, 63, 64, 65, 127, 130])
@pytest.mark.parametrize("chunk_size", [64, 63])
def test_chunk_edges(prefix, chunk_size, device):
    """Depths 0 to 4: the edge lies in the tree, at its root, just behind it, or in the prefix."""
    trees = [[-1, 0, 0, 1, 1, 3, 5, 2]]
    case = _case(trees, [prefix], device, dtype=torch.float16)
    _check(case, chunk_size, trees, num_splits=1 + prefix % 2)


@pytest.mark.parametrize("ratio", range(1, 9))
def test_ratios(ratio, device):
    trees = [TREES["random"][:9]]
    heads = (ratio, 1) if ratio > 4 else (2 * ratio, 2)
    case = _case(trees, [66], device, heads=heads, dtype=torch.float16)
    _check(case, None, trees, num_splits=2)


@pytest.mark.parametrize(
    ("prefix", "chunk_size", "splits"), [(0, None, 1), (62, 100, 2), (129, 100, 1), (129, None, 2)]
)
def test_long_chain_in_many_tiles(prefix, chunk_size, splits, device):
    """Tiles of rows whose keys are all full, all masked, or full between two masked ends."""
    trees = [list(range(-1, 129))]
    case = _case(trees, [prefix], device, chains=True, heads=(1, 1), dtype=torch.float16)
    _check(case, chunk_size, trees, num_splits=splits)


@pytest.mark.parametrize("splits", [1, 3])
def test_chain_with_words_has_the_bits_of_a_causal_one(splits, device):
    q, *caches, rows = _case([TREES["chain"]], [64], device, heads=(1, 1))
    causal = replace(rows, ancestors_T=None)
    for chunk_size in (None, 70):
        with_words, without = (
            tree_attention(q, *caches, r, chunk_size, SCALE, num_splits=splits)
            for r in (rows, causal)
        )
        assert same_bits(with_words, without)


@pytest.mark.parametrize("shape", ["k-ary", "random"])
def test_paths_are_chains(shape, device):
    """Every root-to-leaf path, its keys moved next to each other, run as a chain."""
    tree, prefix = TREES[shape], 66
    q, k_cache, v_cache, rows = _case([tree], [prefix], device, page_size=1)
    out = tree_attention(q, k_cache, v_cache, rows, 68, SCALE)
    leaves = set(range(len(tree))) - set(tree)
    for path in (sorted(_ancestors(tree)[leaf]) for leaf in leaves):
        kept = torch.tensor([*range(prefix), *(prefix + j for j in path)], device=device)
        chain = TreeRows(
            positions_T=prefix + torch.arange(len(path), device=device),
            row_starts_B1=torch.tensor([0, len(path)], dtype=torch.int32, device=device),
            prefix_lengths_B=rows.prefix_lengths_B,
            page_table_BM=rows.page_table_BM[:, kept],
            ancestors_T=None,
            max_rows=len(path),
        )
        alone = tree_attention(q[path], k_cache, v_cache, chain, 68, SCALE)
        assert torch.allclose(out[path], alone, atol=2e-6, rtol=0)


def test_a_sequence_does_not_know_its_batch(device):
    """Bit by bit, for one number of shares and one bound of the rows."""
    trees = [TREES["random"], [-1, 0], TREES["star"]]
    q, k_cache, v_cache, rows = _case(
        trees, [130, 7, 64], device, heads=(2, 1), dtype=torch.float16
    )
    assert rows.ancestors_T is not None
    together = tree_attention(q, k_cache, v_cache, rows, 100, SCALE, num_splits=3)
    for b in range(3):
        own = slice(*rows.row_starts_B1[b : b + 2].tolist())
        alone = replace(
            rows,
            positions_T=rows.positions_T[own],
            ancestors_T=rows.ancestors_T[own],
            row_starts_B1=rows.row_starts_B1[b : b + 2] - rows.row_starts_B1[b],
            prefix_lengths_B=rows.prefix_lengths_B[b : b + 1],
            page_table_BM=rows.page_table_BM[b : b + 1],
        )
        single = tree_attention(q[own], k_cache, v_cache, alone, 100, SCALE, num_splits=3)
        assert same_bits(single, together[own])


def _fp8_case(device, scales, dtype=torch.float32, prefix=70):
    q, *caches, rows = _case([[-1, 0, 0, 2]], [prefix], device, heads=(4, 2), dtype=dtype)
    # the interpreter rounds to FP8 wrongly: quantised by torch, NaN in the unused slots stays NaN
    caches = [(100 * x.float()).clamp(-448, 448).to(FP8) for x in caches]
    k_scale, v_scale = (torch.rand(n, device=device) / 50 + 0.01 for n in scales)
    return (q, *caches, rows), k_scale, v_scale


@pytest.mark.parametrize(
    ("splits", "scales"), [(1, (1, 1)), (1, (2, 2)), (2, (1, 1)), (2, (2, 2)), (2, (1, 2))]
)
def test_fp8_caches(scales, splits, device, dtypes):
    for dtype in dtypes if splits == 1 else dtypes[1:]:
        case, k_scale, v_scale = _fp8_case(device, scales, dtype)

        def ref(*arguments):
            *rest, ks, vs = arguments
            return tree_attention_ref(*rest, None, SCALE, k_scale=ks, v_scale=vs)

        def attend(*arguments):
            *rest, ks, vs = arguments
            return tree_attention(*rest, None, SCALE, k_scale=ks, v_scale=vs, num_splits=splits)

        actual = run_guarded(attend, *case, k_scale, v_scale, runs=1)
        truth, eager = exact(ref, *case, k_scale, v_scale), ref(*case, k_scale, v_scale)
        assert_as_accurate(actual, truth, eager)


@pytest.mark.parametrize(
    ("splits", "poison"), [(1, torch.nan), (2, torch.nan), (2, torch.inf), (2, -torch.inf)]
)
def test_spoilt_value_reaches_only_who_sees_it(splits, poison, device):
    """Row 2 or a key of the old chunk is spoilt: rows beside and beyond must not notice."""
    tree = TREES["random"]
    for dtype in (torch.float32,) if splits == 1 else (torch.float16,):
        case = _case([tree], [66], device, heads=(1, 1), dtype=dtype)
        q, k_cache, v_cache, rows = case
        # positions go from 66 to 70: the edge at 68 hides the prefix from rows of depth 2 and more
        clean = tree_attention(*case, 68, SCALE, num_splits=splits)
        descendants = [2 in a for a in _ancestors(tree)]
        old = [len(a) <= 2 for a in _ancestors(tree)]
        for slot, sees in (
            (68, [d and len(a) <= 2 for d, a in zip(descendants, _ancestors(tree), strict=True)]),
            (65, old),
        ):
            page, inside = int(rows.page_table_BM[0, slot // 16]), slot % 16
            dirty = v_cache.clone()
            dirty[page, inside, 0, 3] = poison
            out = tree_attention(q, k_cache, dirty, rows, 68, SCALE, num_splits=splits)
            sees = torch.tensor(sees, device=device)
            assert same_bits(out[~sees], clean[~sees])
            others = [k for k in range(16) if k != 3]
            assert same_bits(out[sees][..., others], clean[sees][..., others])
            expected = torch.full_like(out[sees][..., 3], poison)
            assert torch.equal(out[sees][..., 3].nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("splits", [1, 2])
def test_other_rows_change_no_bit(splits, device):
    """Rows 2 and 8 get other queries, keys and values, far larger than those of their tile."""
    tree = TREES["random"]
    q, k_cache, v_cache, rows = _case([tree], [66], device, dtype=torch.float16)
    before = tree_attention(q, k_cache, v_cache, rows, 68, SCALE, num_splits=splits)
    for row in (2, 8):
        page, inside = int(rows.page_table_BM[0, (66 + row) // 16]), (66 + row) % 16
        for x in (q[row], k_cache[page, inside], v_cache[page, inside]):
            x.normal_(0, 1000)
    after = tree_attention(q, k_cache, v_cache, rows, 68, SCALE, num_splits=splits)
    apart = torch.tensor([not {2, 8} & a for a in _ancestors(tree)], device=device)
    assert 2 < apart.sum() < 11
    assert same_bits(after[apart], before[apart])
    assert not same_bits(after[~apart], before[~apart])


def test_infinities_of_both_signs_are_nan(device):
    q, k_cache, v_cache, rows = _case([[-1, 0, 0]], [5], device)
    for slot, value in ((6, torch.inf), (5, -torch.inf)):
        v_cache[int(rows.page_table_BM[0, 0]), slot, 0, 2] = value
    out = tree_attention(q, k_cache, v_cache, rows, None, SCALE)
    assert (out[[0, 2]][..., 2] == -torch.inf).all()
    assert out[1, :, 2].isnan().all()


@pytest.mark.parametrize("splits", [1, 3])
def test_nan_in_a_query_or_key_stays_in_its_rows(splits, device):
    q, k_cache, v_cache, rows = _case([TREES["star"]], [130], device)
    clean = tree_attention(q, k_cache, v_cache, rows, None, SCALE, num_splits=splits)
    q[4, 1, 2] = torch.nan
    k_cache[int(rows.page_table_BM[0, 137 // 16]), 137 % 16] = torch.nan  # row 7
    out = tree_attention(q, k_cache, v_cache, rows, None, SCALE, num_splits=splits)
    kept = [0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12]
    assert same_bits(out[kept], clean[kept])
    assert same_bits(out[4, 0], clean[4, 0])
    assert out[4, 1].isnan().all()
    assert out[7].isnan().all()


def test_pages_below_the_chunk_are_not_looked_up(device):
    """The chunk starts at 144, inside a tile of 64 keys."""
    q, k_cache, v_cache, rows = _case([TREES["random"]], [200], device)
    expected = tree_attention(q, k_cache, v_cache, rows, 72, SCALE, num_splits=2)
    recycled = rows.page_table_BM.clone()
    recycled[:, : 144 // 16] = INT_MAX
    rows = replace(rows, page_table_BM=recycled)
    assert same_bits(tree_attention(q, k_cache, v_cache, rows, 72, SCALE, num_splits=2), expected)


def _counted_reads(monkeypatch, caches, call):
    """Bytes that `call` loads from `caches` in Triton's interpreter."""
    from triton.runtime import interpreter

    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in caches]
    builder, counted = interpreter.interpreter_builder, [0]
    plain = interpreter.InterpreterBuilder.create_masked_load

    def create_masked_load(pointers, mask, *rest):
        at = pointers.data[mask.data.astype(bool)]
        inside = sum(int(((at >= first) & (at < last)).sum()) for first, last in spans)
        counted[0] += inside * caches[0].itemsize
        return plain(builder, pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", create_masked_load, raising=False)
    call()
    return counted[0]


def _allocations(monkeypatch):
    """A list of the shapes that an op allocates from now on (the interpreter passes a number)."""
    shapes = []

    def counted(plain):
        def allocate(like, size, *extra, **named):
            if not isinstance(size, int):
                shapes.append(torch.Size(size))
            return plain(like, size, *extra, **named)

        return allocate

    for name in ("new_zeros", "new_empty", "new_full"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    return shapes


@pytest.mark.parametrize(
    ("num_rows", "prefix", "chunk_size"),
    [
        (1, 0, None),
        (12, 200, None),
        (12, 200, 72),
        (13, 130, None),
        (1, 255, 64),
    ],
)
@pytest.mark.parametrize("kind", ["fp32", "fp16", "fp8"])
def test_every_key_is_read_once_per_tile(num_rows, prefix, chunk_size, kind, device, monkeypatch):
    """What the plan counts is what the kernel loads, and the minimum up to 64 packed rows."""
    if device.type != "cpu":
        pytest.skip("counts loads in the interpreter")
    trees, scales, splits = [TREES["star"][:num_rows]], {}, 1
    dtype = torch.float32 if kind == "fp32" else torch.float16
    q, *caches, rows = _case(trees, [prefix], device, heads=(10, 2), dtype=dtype)
    if kind == "fp8":
        caches, one, splits = [x.to(FP8) for x in caches], torch.ones(1, device=device), 3
        scales = {"k_scale": one, "v_scale": one}
    moved = _counted_reads(
        monkeypatch,
        caches,
        lambda: tree_attention(q, *caches, rows, chunk_size, SCALE, num_splits=splits, **scales),
    )
    keys = prefix + num_rows - (prefix - prefix % chunk_size if chunk_size else 0)
    block_m = _launch_config(HOPPER, num_rows, 5, 16, q.itemsize).BLOCK_M
    itemsize = caches[0].itemsize
    assert moved == kv_bytes_read(5 * num_rows, block_m, keys, 2, 16, itemsize)
    minimum = keys * 2 * 2 * 16 * itemsize
    assert moved == (minimum if num_rows * 5 <= 64 else 2 * minimum)


@pytest.mark.parametrize("chunk_size", [None, 48])
def test_a_prompt_reads_its_chunks_and_allocates_its_output(chunk_size, device, monkeypatch):
    """Per tile of 64 rows what lies between the chunk of its first row and its last row: no mask
    of rows by keys exists, and keys of older chunks are not read."""
    if device.type != "cpu":
        pytest.skip("counts loads in the interpreter")
    prefix, num_rows = 62, 130
    trees = [list(range(-1, num_rows - 1))]
    options = {"chains": True, "heads": (1, 1), "dtype": torch.float16}
    q, *caches, rows = _case(trees, [prefix], device, **options)
    allocated = _allocations(monkeypatch)
    moved = _counted_reads(
        monkeypatch,
        caches,
        lambda: tree_attention(q, *caches, rows, chunk_size, SCALE, num_splits=1),
    )
    assert allocated == [q.shape]
    tiles = range(0, num_rows, _launch_config(HOPPER, num_rows, 1, 16, 2).BLOCK_M)
    assert len(tiles) == 3
    firsts = [(prefix + t) // chunk_size * chunk_size if chunk_size else 0 for t in tiles]
    ends = [prefix + min(num_rows, t + tiles.step) for t in tiles]
    keys = sum(end - first for first, end in zip(firsts, ends, strict=True))
    assert moved == keys * 2 * 16 * 2


@pytest.mark.parametrize("itemsize", [4, 2, 1], ids=["fp32", "bf16 and fp16", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("target", [AMPERE, HOPPER, BLACKWELL, MI300], ids=lambda t: t.unit)
def test_plan_reads_each_byte_once_up_to_64_packed_rows(target, head_dim, itemsize):
    for rows in range(1, 65):
        block_m = _launch_config(target, rows, 5, head_dim, max(2, itemsize)).BLOCK_M
        moved = kv_bytes_read(5 * rows, block_m, 131072, 8, head_dim, itemsize)
        assert moved == -(-5 * rows // 64) * 131072 * 2 * 8 * head_dim * itemsize


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, None])
def test_a_captured_graph_follows_lengths_and_trees(splits, device):
    """Captured on one tree, replayed on others: bit by bit what a fresh call gives."""
    shapes, prefixes = list(TREES.values()), [4000, 0, 63, 2047]
    width = -(-(max(prefixes) + 13) // 16)
    pool = torch.randperm(width, device=device).int()[None]
    caches = torch.randn(2, width, 16, 8, 128, device=device, dtype=torch.bfloat16)
    q = torch.randn(13, 40, 128, device=device, dtype=torch.bfloat16)

    def placed(tree, prefix):
        sets = [_ancestors(tree)]
        return (
            torch.tensor([prefix + len(a) - 1 for s in sets for a in s], device=device),
            torch.tensor([prefix], dtype=torch.int32, device=device),
            torch.tensor([_word(a) for s in sets for a in s], device=device),
        )

    def attend(positions, prefix, words):
        starts = torch.tensor([0, 13], dtype=torch.int32, device=device)
        rows = TreeRows(positions, starts, prefix, pool, words, 13)
        return lambda: tree_attention(q, *caches, rows, 1024, SCALE, num_splits=splits)

    static = placed(shapes[0], prefixes[0])
    run = attend(*static)
    run()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for tree, prefix in zip(shapes, prefixes, strict=True):
        fresh = placed(tree, prefix)
        for kept, new in zip(static, fresh, strict=True):
            kept.copy_(new)
        q.normal_()
        graph.replay()
        assert same_bits(out, attend(*fresh)())


def test_split_rule():
    assert split_count(1, 8, 131072, None, 8) == 32
    assert split_count(5, 8, 131072, None, 64) == 3
    assert split_count(1, 8, 131072, 8192, 8) == 32
    assert split_count(1, 8, 1024, None, 8) == 4
    assert split_count(1, 8, 511, None, 8) == 1
    assert split_count(1, 8 * 64, 131072, None, 8) == 1  # a batch fills the GPU by itself
    assert split_count(640, 8, 8192, None, 8192) == 1  # a prompt too
    for tiles in range(1, 9):
        for groups in (1, 8, 40, 1000):
            for capacity in (1, 256, 4096, 131072):
                count = split_count(tiles, groups, capacity, None, 8)
                assert 1 <= count <= MAX_SPLITS
                assert count == 1 or capacity // count >= 256


def test_a_large_table_splits_by_itself(device):
    """The capacity, not the length, decides: most of the shares find nothing to do."""
    case = _case([TREES["random"]], [40], device, spare=200)
    _check(case, None, [TREES["random"]])


def test_padding_rows_are_zero_with_splits(device):
    q, *caches, rows = _case([TREES["star"]], [70], device)
    clean = tree_attention(q, *caches, rows, None, SCALE, num_splits=2)
    padded = replace(
        rows,
        positions_T=torch.cat([rows.positions_T, torch.full_like(rows.positions_T, -7)]),
        ancestors_T=torch.cat([rows.ancestors_T, torch.full_like(rows.ancestors_T, -1)]),
    )
    nan = torch.full_like(q, torch.nan)
    out = tree_attention(torch.cat([q, nan]), *caches, padded, None, SCALE, num_splits=2)
    assert same_bits(out[:13], clean)
    assert same_bits(out[13:], torch.zeros_like(q))


def test_compiles_with_splits_and_scales(device):
    (q, *caches, rows), k_scale, v_scale = _fp8_case(device, (1, 2))
    step = (rows.positions_T, rows.row_starts_B1, rows.prefix_lengths_B, rows.page_table_BM)
    arguments = (q, *caches, *step, rows.ancestors_T, k_scale, v_scale)

    def attend(q, k, v, positions, starts, lengths, table, ancestors, k_scale, v_scale):
        step = TreeRows(positions, starts, lengths, table, ancestors, 4)
        return tree_attention(
            q, k, v, step, 8, SCALE, k_scale=k_scale, v_scale=v_scale, num_splits=2
        )

    check_compiles(attend, *arguments)


def test_opcheck_with_splits(device):
    q, *caches, rows = _case([[-1, 0]], [3], device)
    caches = [x.nan_to_num() for x in caches]
    step = (rows.positions_T, rows.row_starts_B1, rows.prefix_lengths_B, rows.page_table_BM)
    rest = (rows.ancestors_T, rows.max_rows, None, SCALE, None, None, 2)
    torch.library.opcheck(_tree_attention_op, (q, *caches, *step, *rest))


def test_rejects_bad_arguments(device):
    q, k_cache, v_cache, rows = _case([[-1, 0]], [3], device, heads=(4, 2))
    one, fp8 = torch.ones(1, device=device), k_cache.to(FP8)

    def attend(q=q, k=k_cache, v=v_cache, rows=rows, **named):
        tree_attention(q, k, v, rows, None, SCALE, **named)

    for count in (0, 65):
        with pytest.raises(ValueError, match=f"num_splits: must be None or 1 to 64, got {count}"):
            attend(num_splits=count)
    with pytest.raises(ValueError, match="k_scale: must be given with .* only then, got one"):
        attend(k_scale=one)
    with pytest.raises(ValueError, match="v_scale: must be given with .* only then, got none"):
        attend(k=fp8, v=fp8, k_scale=one)
    with pytest.raises(ValueError, match=r"k_scale: must be a contiguous float32 \[2\] or \[1\]"):
        attend(k=fp8, v=fp8, k_scale=torch.ones(3, device=device), v_scale=one)
    with pytest.raises(ValueError, match="v_scale: must be a contiguous float32"):
        attend(k=fp8, v=fp8, k_scale=one, v_scale=one.double())
    with pytest.raises(ValueError, match="k_cache_RCGK: must be torch.float32 or torch.float8"):
        attend(k=k_cache.half(), v=v_cache.half())
    with pytest.raises(ValueError, match="v_cache_RCGK: must be torch.float8_e4m3fn"):
        attend(k=fp8, k_scale=one, v_scale=one)
    with pytest.raises(ValueError, match="q_THK: must be one of"):
        attend(q=q.double())
    with pytest.raises(ValueError, match="page_table_BM: must have room for max_rows 40"):
        attend(rows=replace(rows, max_rows=40))
    wide = torch.zeros(1, 8, dtype=torch.int32, device=device)[:, ::2]
    with pytest.raises(
        ValueError, match="rows.page_table_BM: must be torch.int32 with a contiguous"
    ):
        attend(rows=replace(rows, page_table_BM=wide))


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("row_starts_B1", [0, 4], "must rise from 0 to at most 3, by at most max_rows 3"),
        ("row_starts_B1", [2, 1], "must rise"),
        ("row_starts_B1", [-1, 1], "must rise"),
        ("prefix_lengths_B", [-1], "must be 0 or more"),
        ("prefix_lengths_B", [46], "got 46 and 3 for 48 slots"),
        ("positions_T", [15, 16, 19], "row 2 behind 15 slots must stand at 17 or less"),
        ("positions_T", [14, 16, 16], "row 0 behind 15 slots"),
        ("ancestors_T", [1, 3, 9], "row 2 must see itself and no row behind it .* word 0x9"),
        ("ancestors_T", [3, 3, 5], "row 0 must see itself"),
        ("ancestors_T", [1, 1, 5], "row 1 must see itself"),
        ("ancestors_T", [1, 3, -4], "row 2 must see itself .* word 0xfffffffffffffffc"),
        ("page_table_BM", [[0, 3]], r"entries of slots 0 to 17 must be 0 to 2, got \[0, 3\]"),
        ("page_table_BM", [[-1, 0]], "must be 0 to 2"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(name, values, message, device):
    if device.type != "cpu":
        pytest.skip("values on a GPU are not read")
    q, *caches, rows = _case([[-1, 0, 0]], [15], device)
    tree_attention(q, *caches, rows, None, SCALE)
    wrong = torch.tensor(values, dtype=getattr(rows, name).dtype)
    with pytest.raises(ValueError, match=rf"rows\.{name}.*{message}"):
        tree_attention(q, *caches, replace(rows, **{name: wrong}), None, SCALE)


def test_a_chain_that_leaves_a_gap_is_refused(device):
    if device.type != "cpu":
        pytest.skip("values on a GPU are not read")
    q, *caches, rows = _case([[-1, 0]], [3], device, chains=True)
    gap = replace(rows, positions_T=rows.positions_T + torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="row 1 behind 3 slots must stand at 4, got 5"):
        tree_attention(q, *caches, gap, None, SCALE)
