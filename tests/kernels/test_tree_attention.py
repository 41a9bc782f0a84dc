"""Tree attention against its reference, and both against a dense float64 statement of the rules.

Regimes: chains, random trees up to 64 nodes, ragged batches with an empty sequence; prefix 0, 1, at
a page edge, at a chunk edge; a tree and a chain that straddle a chunk edge; GQA 1:1 and 5:1, head
dimensions off a power of two, pages of 1 to 16 tokens; shuffled pages with NaN in every unused slot
and INT_MAX in unused table entries; a NaN row, padding rows, strided and expanded queries, pages
beyond 2^31 elements, writes outside the output, unequal runs, bad arguments.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerie.kernels.target import AMPERE, BLACKWELL, HOPPER, MI300
from aerie.kernels.tree_attention import (
    MAX_TREE_ROWS,
    TreeRows,
    _launch_config,
    _tree_attention_op,
    tree_attention,
    tree_attention_ref,
)
from tests.evidence import (
    VAST,
    assert_as_accurate,
    check_compiles,
    edges,
    few_examples,
    laid_out,
    layouts,
    on_gpu,
    run_guarded,
    same_bits,
    vast,
)

INT_MAX = 2**31 - 1
# of the reference: one rounding to the dtype, or a float32 softmax over S keys (a few 1e-7)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SCALE = 0.3


def _random_tree(num_rows):
    """Parents before children; the root's is -1."""
    return [-1, *[int(torch.randint(n, ())) for n in range(1, num_rows)]]


def _ancestor_sets(parents):
    sets = []
    for row, parent in enumerate(parents):
        sets.append({row} | (sets[parent] if parent >= 0 else set()))
    return sets


def _word(ancestors):
    word = sum(1 << j for j in ancestors)
    return word - 2**64 if word >= 2**63 else word


def _case(trees, prefixes, device, page_size=4, heads=(2, 1), head_dim=16, chains=False, **extra):
    """Queries, caches with NaN outside the used slots, and the rows of `trees` (lists of parents).

    `extra` is the dtype; with `chains` the rows carry no ancestor words.
    """
    dtype = extra.get("dtype", torch.float32)
    sets = [_ancestor_sets(parents) for parents in trees]
    used = [prefix + len(tree) for prefix, tree in zip(prefixes, trees, strict=True)]
    pages_used = [-(-slots // page_size) for slots in used]
    pool = torch.randperm(sum(pages_used) + 2).tolist()
    table = torch.full((len(trees), max(pages_used) + 2), INT_MAX, dtype=torch.int32)
    caches = torch.full((2, len(pool), page_size, heads[1], head_dim), torch.nan)
    for b, slots in enumerate(used):
        for s in range(slots):
            if s % page_size == 0:
                table[b, s // page_size] = pool.pop()
            caches[:, table[b, s // page_size], s % page_size] = torch.randn(2, heads[1], head_dim)
    rows = TreeRows(
        positions_T=torch.tensor(
            [p + len(a) - 1 for p, s in zip(prefixes, sets, strict=True) for a in s],
            dtype=torch.int64,
            device=device,
        ),
        row_starts_B1=torch.tensor([0, *map(len, trees)], device=device).cumsum(0).int(),
        prefix_lengths_B=torch.tensor(prefixes, dtype=torch.int32, device=device),
        page_table_BM=table.to(device),
        ancestors_T=None
        if chains
        else torch.tensor([_word(a) for s in sets for a in s], dtype=torch.int64, device=device),
        max_rows=max(map(len, trees)),
    )
    q = torch.randn(sum(map(len, trees)), heads[0], head_dim, device=device).to(dtype)
    return q, *caches.to(device, dtype), rows


def _dense(q, k_cache, v_cache, rows, chunk_size, trees):
    """The rules key by key, in float64; in a chain every row hangs on the last."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    page_size, ratio = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for b, tree in enumerate(trees):
        prefix, start = int(rows.prefix_lengths_B[b]), int(rows.row_starts_B1[b])
        for i, ancestors in enumerate(_ancestor_sets(tree)):
            position = int(rows.positions_T[start + i])
            seen = []
            for s in range(prefix + len(tree)):
                j = s - prefix
                key_position = s if j < 0 else int(rows.positions_T[start + j])
                if j >= 0 and j not in ancestors:
                    continue
                if chunk_size is None or key_position // chunk_size >= position // chunk_size:
                    seen.append((int(rows.page_table_BM[b, s // page_size]), s % page_size))
            k, v = (
                torch.stack([cache[page, offset] for page, offset in seen]).double()
                for cache in (k_cache.cpu(), v_cache.cpu())
            )
            for h in range(q.shape[1]):
                weights = (k[:, h // ratio] @ q[start + i, h].cpu().double() * SCALE).softmax(0)
                out[start + i, h] = weights @ v[:, h // ratio]
    return out.to(q.device)


def _check(case, chunk_size, trees, runs=1):
    dense = _dense(*case, chunk_size, trees)
    eager = tree_attention_ref(*case, chunk_size, SCALE)
    error = (eager.double() - dense).abs().max() / dense.abs().max()
    assert error <= TOLERANCE[eager.dtype], f"the reference is off by {error:.3e}"
    actual = run_guarded(tree_attention, *case, chunk_size, SCALE, runs=runs)
    assert_as_accurate(actual, dense, eager)


def _chain(num_rows):
    return list(range(-1, num_rows - 1))


@pytest.mark.parametrize("prefix", [0, 1, 7, 8, 70])
@pytest.mark.parametrize("chains", [True, False], ids=["causal", "words"])
def test_chain(prefix, chains, device):
    trees = [_chain(5)]
    _check(_case(trees, [prefix], device, chains=chains), None, trees)


@pytest.mark.parametrize("num_rows", [1, 2, 13, MAX_TREE_ROWS])
def test_random_tree(num_rows, device, dtypes):
    trees = [_random_tree(num_rows)]
    for dtype in dtypes:
        case = _case(trees, [9], device, heads=(10, 2), head_dim=24, dtype=dtype)
        _check(case, None, trees)


@few_examples
@given(edges(16, 18), edges(64, 70), st.sampled_from([None, 8]), st.booleans(), layouts())
def test_any_shape_and_layout(device, num_rows, prefix, chunk_size, chains, layout):
    torch.manual_seed(num_rows)
    trees = [_chain(num_rows) if chains else _random_tree(num_rows)]
    q, *caches, rows = _case(trees, [prefix], device, page_size=16, chains=chains)
    _check((laid_out(q, layout), *caches, rows), chunk_size, trees)


@pytest.mark.parametrize("case", on_gpu((1, 32768), (8, 32768), (64, 8190), (16, 131072)))
def test_llama_4_heads(case, device, dtypes):
    """Against the reference alone in float64: the dense statement is too slow for so many keys."""
    num_rows, prefix = case
    for dtype in dtypes:
        q, *caches, rows = _case(
            [_random_tree(num_rows)], [prefix], device, 64, heads=(40, 8), head_dim=128, dtype=dtype
        )
        caches = [x.nan_to_num() for x in caches]  # torch masks by adding, and inf + NaN is NaN
        for chunk_size in (None, 8192):
            actual = run_guarded(tree_attention, q, *caches, rows, chunk_size, SCALE)
            wide = [x.double() for x in (q, *caches)]
            truth = tree_attention_ref(*wide, rows, chunk_size, SCALE)
            eager = tree_attention_ref(q, *caches, rows, chunk_size, SCALE)
            assert_as_accurate(actual, truth, eager)


def test_page_beyond_32_bit_offsets(device):
    q, k_cache, v_cache, rows = _case([_chain(2)], [3], device, dtype=torch.float16)
    expected = tree_attention(q, k_cache, v_cache, rows, None, SCALE)
    page, last = k_cache[0].numel(), VAST // k_cache[0].numel()
    far = vast(4 * page, torch.float16, device)[: (last + 4) * page].view(-1, *k_cache.shape[1:])
    used = rows.page_table_BM[0, :2].clone()
    rows.page_table_BM[0, :2] = torch.tensor([last + 2, last], device=device)
    for cache, offset in ((k_cache, 0), (v_cache, 1)):
        far[[last + 2 + offset, last + offset]] = cache[used.long()]
    values = far[1:]  # the pages behind those of the keys
    assert same_bits(tree_attention(q, far[:-1], values, rows, None, SCALE), expected)


@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_ragged_batch(page_size, chunk_size, device):
    trees = [_random_tree(6), [-1], _random_tree(19), _chain(3)]
    case = _case(trees, [0, 33, 5, 16], device, page_size=page_size, heads=(5, 1))
    _check(case, chunk_size, trees)


@pytest.mark.parametrize("prefix", [5, 6, 7, 8, 9, 15, 16, 17, 67])
def test_tree_at_a_chunk_edge(prefix, device):
    trees = [[-1, 0, 0, 1, 2, 3, 3, 4, 6]]
    _check(_case(trees, [prefix], device), 8, trees)


@pytest.mark.parametrize(("prefix", "num_rows"), [(0, 150), (6, 20), (8, 8), (130, 1), (63, 66)])
def test_chain_over_chunk_edges(prefix, num_rows, device):
    trees = [_chain(num_rows)]
    for chunk_size in (8, 64):
        case = _case(trees, [prefix], device, page_size=16, chains=True)
        _check(case, chunk_size, trees)


def test_last_row_of_a_tile_sees_itself(device):
    """Rows 96 to 127 fill a tile and see 65 keys from the chunk edge 63 on: one past a key tile."""
    trees = [_chain(128)]
    _check(_case(trees, [0], device, heads=(1, 1), chains=True), 63, trees)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (40, 8)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_heads(heads, head_dim, device):
    trees = [_random_tree(4)]
    _check(_case(trees, [6], device, heads=heads, head_dim=head_dim), 4, trees)


def test_sequence_without_rows(device):
    trees = [[-1, 0], [], [-1, 0, 0]]
    _check(_case(trees, [3, 5, 4], device), None, trees)


def test_padding_rows_are_zero(device):
    trees = [_random_tree(3)]
    q, k_cache, v_cache, rows = _case(trees, [5], device)
    clean = tree_attention(q, k_cache, v_cache, rows, None, SCALE)
    padded = replace(
        rows,
        positions_T=torch.cat([rows.positions_T, torch.full_like(rows.positions_T, -7)]),
        ancestors_T=torch.cat([rows.ancestors_T, torch.full_like(rows.ancestors_T, -1)]),
    )
    q = torch.cat([q, torch.full_like(q, torch.nan)])
    for op in (tree_attention, tree_attention_ref):
        out = op(q, k_cache, v_cache, padded, None, SCALE)
        assert out[3:].count_nonzero() == 0
        assert torch.allclose(out[:3], clean, atol=1e-6)


def test_nan_reaches_only_descendants(device):
    """Row 1 holds NaN as query and key; rows 2 and 4 hang on the root alone."""
    tree = [-1, 0, 0, 1, 2]
    q, k_cache, v_cache, rows = _case([tree], [6], device)
    clean = tree_attention(q, k_cache, v_cache, rows, None, SCALE)
    page, offset = int(rows.page_table_BM[0, 7 // 4]), 7 % 4
    q[1] = torch.nan
    k_cache[page, offset] = torch.nan
    poisoned = tree_attention(q, k_cache, v_cache, rows, None, SCALE)
    assert torch.equal(poisoned[[0, 2, 4]], clean[[0, 2, 4]])
    assert poisoned[[1, 3]].isnan().all()


def test_nan_value_is_not_read_by_a_tile_that_never_sees_it(device):
    """Row 39, a leaf below row 38, holds NaN as value; the first rows fill other tiles."""
    q, k_cache, v_cache, rows = _case([_chain(40)], [6], device)
    clean = tree_attention(q, k_cache, v_cache, rows, None, SCALE)
    v_cache[int(rows.page_table_BM[0, 45 // 4]), 45 % 4] = torch.nan
    poisoned = tree_attention(q, k_cache, v_cache, rows, None, SCALE)
    assert torch.equal(poisoned[:32], clean[:32])
    assert poisoned[39].isnan().all()


def test_nan_values_below_the_chunk_do_not_leak(device):
    q, k_cache, v_cache, rows = _case([_chain(3)], [9], device, chains=True)
    clean = tree_attention(q, k_cache, v_cache, rows, 8, SCALE)
    for page in rows.page_table_BM[0, :2].tolist():  # logical slots 0 to 7: a dead chunk
        k_cache[page], v_cache[page] = torch.nan, torch.nan
    for op in (tree_attention, tree_attention_ref):
        assert torch.allclose(op(q, k_cache, v_cache, rows, 8, SCALE), clean, atol=1e-6)


def test_strided_queries(device):
    trees = [_random_tree(5)]
    q, k_cache, v_cache, rows = _case(trees, [6], device, heads=(4, 2))
    wide = torch.randn(5, 8, 16, device=device)
    wide[:, 2:6] = q
    _check((wide[:, 2:6], k_cache, v_cache, rows), None, trees)


def test_layout_changes_no_bit(device):
    q, *rest = _case([_random_tree(5)], [6], device, heads=(4, 2))
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    expected = tree_attention(q, *rest, None, SCALE)
    assert same_bits(tree_attention(swapped, *rest, None, SCALE), expected)
    expanded = tree_attention(q[:, :1].expand(5, 4, 16), *rest, None, SCALE)
    assert same_bits(expanded[:, 0], expected[:, 0])


def test_two_runs_are_equal(device):
    trees = [_random_tree(13), _chain(1)]
    case = _case(trees, [9, 70], device, heads=(10, 2), head_dim=24)
    _check(case, 8, trees, runs=2)


def test_layer_of_a_stacked_cache(device):
    trees = [_random_tree(5)]
    q, k_cache, v_cache, rows = _case(trees, [6], device)
    stacked = torch.full((2, 3, *k_cache.shape), torch.nan, device=device)
    stacked[0, 1], stacked[1, 1] = k_cache, v_cache
    _check((q, stacked[0, 1], stacked[1, 1], rows), None, trees)


def test_layers_of_a_step_share_what_they_see(device):
    q, k_cache, v_cache, rows = _case([_random_tree(4)], [6], device)
    first = tree_attention_ref(q, k_cache, v_cache, rows, None, SCALE)
    rows.positions_T.fill_(-1)  # a second layer of the step does not read the rows again
    assert torch.equal(tree_attention_ref(q, k_cache, v_cache, rows, None, SCALE), first)


def test_reference_attends_a_prompt_in_blocks(device, monkeypatch):
    monkeypatch.setattr("aerie.kernels.tree_rows.ROW_BLOCK", 3)
    trees = [_chain(8), _chain(3), _chain(4)]
    case = _case(trees, [5, 0, 2], device, chains=True)
    eager, dense = tree_attention_ref(*case, 4, SCALE), _dense(*case, 4, trees)
    assert (eager.double() - dense).abs().max() <= TOLERANCE[eager.dtype] * dense.abs().max()


def test_no_rows(device):
    q, k_cache, v_cache, rows = _case([[-1]], [3], device)
    empty = replace(
        rows,
        positions_T=rows.positions_T[:0],
        ancestors_T=None,
        row_starts_B1=torch.zeros_like(rows.row_starts_B1),
    )
    for op in (tree_attention, tree_attention_ref):
        assert op(q[:0], k_cache, v_cache, empty, 8, SCALE).shape == (0, 2, 16)


def test_compiles_once_for_all_row_counts(device):
    def attend(q, k_cache, v_cache, positions, ancestors, row_starts, prefix_lengths, page_table):
        rows = TreeRows(positions, row_starts, prefix_lengths, page_table, ancestors, 5)
        return tree_attention(q, k_cache, v_cache, rows, 8, SCALE)

    calls = []
    for num_rows in (3, 5):
        q, *caches, rows = _case([_chain(num_rows)], [6], device, page_size=16)
        tables = (rows.row_starts_B1, rows.prefix_lengths_B, rows.page_table_BM)
        calls.append((q, *caches, rows.positions_T, rows.ancestors_T, *tables))
    check_compiles(attend, *calls[0], again=calls[1])


def test_opcheck(device):
    for chains, chunk_size in ((True, None), (False, 4)):
        q, k_cache, v_cache, rows = _case([_chain(2)], [3], device, chains=chains)
        tables = (rows.positions_T, rows.row_starts_B1, rows.prefix_lengths_B, rows.page_table_BM)
        step = (*tables, rows.ancestors_T, rows.max_rows, chunk_size, SCALE)
        k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()
        torch.library.opcheck(_tree_attention_op, (q, k_cache, v_cache, *step))


def test_rejects_bad_arguments(device):
    q, k_cache, v_cache, rows = _case([_random_tree(3)], [5], device, heads=(4, 2))
    with pytest.raises(ValueError, match=r"q_THK: must be \[T, H, K\]"):
        tree_attention(q[0], k_cache, v_cache, rows, None, SCALE)
    with pytest.raises(ValueError, match="a contiguous K of 16 to 128"):
        tree_attention(q[..., :8], k_cache, v_cache, rows, None, SCALE)
    with pytest.raises(ValueError, match="k_cache_RCGK: must be a contiguous"):
        tree_attention(q, k_cache.transpose(0, 1), v_cache, rows, None, SCALE)
    with pytest.raises(ValueError, match="must match k_cache_RCGK"):
        tree_attention(q[:, :3], k_cache, v_cache, rows, None, SCALE)
    with pytest.raises(ValueError, match="page size must be a power of two, got 3"):
        tree_attention(
            q, k_cache[:, :3].contiguous(), v_cache[:, :3].contiguous(), rows, None, SCALE
        )
    with pytest.raises(ValueError, match="chunk_size: must be None or at least 1"):
        tree_attention(q, k_cache, v_cache, rows, 0, SCALE)
    bad = replace(rows, ancestors_T=rows.positions_T[:2])
    with pytest.raises(ValueError, match=r"rows.ancestors_T: must be int64 \[3\]"):
        tree_attention(q, k_cache, v_cache, bad, None, SCALE)
    bad = replace(rows, row_starts_B1=rows.row_starts_B1[:1])
    with pytest.raises(ValueError, match="must fit 1 prefix lengths"):
        tree_attention(q, k_cache, v_cache, bad, None, SCALE)
    with pytest.raises(ValueError, match=f"at most {MAX_TREE_ROWS} with ancestors, got 65"):
        tree_attention(q, k_cache, v_cache, replace(rows, max_rows=65), None, SCALE)


@pytest.mark.parametrize("which", [(0,), (2,), (0, 1, 2)])
def test_rejects_other_dtypes(which, device):
    *tensors, rows = _case([_random_tree(3)], [5], device)
    for i in which:
        tensors[i] = tensors[i].double()
    with pytest.raises(ValueError, match="(q_THK|cache_RCGK): must be"):
        tree_attention(*tensors, rows, None, SCALE)


def test_rejects_tables_the_kernel_would_misread(device):
    q, k_cache, v_cache, rows = _case([_random_tree(3)], [5], device)
    for changed in (
        {"page_table_BM": rows.page_table_BM.float()},
        {"page_table_BM": rows.page_table_BM.repeat(1, 2)[:, ::2]},
        {"row_starts_B1": rows.row_starts_B1.repeat_interleave(2)[::2]},
        {"prefix_lengths_B": rows.prefix_lengths_B.float()},
        {"positions_T": rows.positions_T.repeat_interleave(2)[::2]},
    ):
        with pytest.raises(ValueError, match=f"rows.{next(iter(changed))}: must be"):
            tree_attention(q, k_cache, v_cache, replace(rows, **changed), 8, SCALE)


@pytest.mark.parametrize("max_rows", [1, 5, 64, 8192])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("target", [AMPERE, HOPPER, BLACKWELL, MI300], ids=lambda t: t.unit)
def test_launch_config(max_rows, head_dim, itemsize, target):
    config = _launch_config(target, max_rows, 5, head_dim, itemsize)
    assert config.BLOCK_M * config.m_tiles >= 5 * max_rows
    assert (config.m_tiles == 1) == (5 * max_rows <= 64)
    assert head_dim <= config.BLOCK_K <= 128
    stage = 2 * config.BLOCK_N * config.BLOCK_K * itemsize  # keys and values
    assert config.num_stages * stage <= (64 if target is MI300 else 150) * 1024
