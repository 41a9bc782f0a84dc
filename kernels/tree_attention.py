"""Attention of the rows of one step over a paged cache, under a tree of ancestors.

    o_t = softmax_s(scale * q_t . k_s) V            over the keys s that row t may see

Row t of sequence b sees the committed prefix and, of the new rows of b, its ancestors and itself
(or every row up to itself, if the step is a chain); with a chunk size (Llama 4's local layers) only
keys at positions >= floor(position_t / chunk) * chunk. That bound differs between the rows of one
tree that straddles a chunk edge, as positions follow the depth and not the slot.

Keys and values of new row j already lie in logical slot prefix_length + j. The query heads that
share a kv head are packed with the rows into one tile (row t*(H/G) + g), so 64 packed rows read
every key once. Where such tiles do not fill the GPU their keys are split: each share is attended on
its own, and the shares are merged by their log-sum-exp (Dao et al. 2023, flash-decoding). Scores,
softmax and sums are float32; the weights are rounded to the dtype of the values they multiply.

FP8 keys and values (e4m3) become float16, which holds every one of their values; their scales go
to the scores and to the result. A row's result does not depend on other rows' queries, keys or
values that it does not see, NaN included, nor on other sequences as long as the launch is the same
(`max_rows` and the number of shares). The order of all sums is fixed.

Letters: B sequences, T rows, N rows of one sequence, S keys (or shares), H query heads, G kv heads,
K head dimension, R pages in the pool, C tokens per page, M pages per sequence.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aerie.kernels.backend import check_launchable, rounded, widened
from aerie.kernels.stream_launch import scale_stride
from aerie.kernels.target import Target, target_of
from aerie.kernels.tree_attention_checks import (
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    check_call,
    check_scales,
    check_values,
)
from aerie.kernels.tree_attention_kernel import (
    _tree_attention_kernel,
    _tree_attention_merge_kernel,
)
from aerie.kernels.tree_attention_splits import split_count
from aerie.kernels.tree_rows import MAX_TREE_ROWS, SeenKeys, TreeRows, seen_keys

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_TREE_ROWS",
    "MIN_HEAD_DIM",
    "TreeRows",
    "tree_attention",
    "tree_attention_ref",
]


def tree_attention_ref(
    q_THK: Tensor,
    k_cache_RCGK: Tensor,
    v_cache_RCGK: Tensor,
    rows: TreeRows,
    chunk_size: int | None,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Per sequence: gather its keys, then dense attention under an explicit mask, in float32."""
    sequences = seen_keys(rows, k_cache_RCGK.shape[1], chunk_size)
    if sequences and sequences[0].is_all:
        seen = sequences[0]
        return _attend_ref(q_THK, k_cache_RCGK, v_cache_RCGK, seen, scale, k_scale, v_scale)
    sizes = [seen.rows.stop - seen.rows.start for seen in sequences]
    *owned, of_none = q_THK.split_with_sizes((*sizes, q_THK.shape[0] - sum(sizes)))
    parts = [
        _attend_ref(q_NHK, k_cache_RCGK, v_cache_RCGK, seen, scale, k_scale, v_scale)
        for seen, q_NHK in zip(sequences, owned, strict=True)
    ]
    return torch.cat((*parts, torch.zeros_like(of_none)))


def _attend_ref(
    q_NHK: Tensor,
    k_cache_RCGK: Tensor,
    v_cache_RCGK: Tensor,
    seen: SeenKeys,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """softmax(scale q k^T + bias) v, the heads of a group packed as rows: P = N * H / G."""
    (N, H, K), G = q_NHK.shape, k_cache_RCGK.shape[2]
    wide_NHK = widened(q_NHK)
    k_SGK = _gathered(k_cache_RCGK, k_scale, seen.slots, wide_NHK.dtype)
    v_SGK = _gathered(v_cache_RCGK, v_scale, seen.slots, wide_NHK.dtype)
    if N == 1:  # nothing has to be moved
        q_GPK = wide_NHK.view(G, H // G, K)
    else:
        q_GPK = wide_NHK.view(N, G, H // G, K).transpose(0, 1).reshape(G, -1, K)
    bias_PS = rounded(seen.bias(N * H // G), q_GPK.dtype)
    beta = 0 if bias_PS.numel() == 1 else 1  # a row that sees all: its zero need not be read
    scores_GPS = torch.baddbmm(bias_PS, q_GPK, k_SGK.permute(1, 2, 0), beta=beta, alpha=scale)
    out_GPK = torch.bmm(scores_GPS.softmax(dim=-1), v_SGK.transpose(0, 1))
    if N > 1:
        out_GPK = out_GPK.view(G, N, H // G, K).transpose(0, 1)
    return rounded(out_GPK.reshape(N, H, K), q_NHK.dtype)


def _gathered(
    cache_RCGK: Tensor, scale: Tensor | None, slots_S: Tensor | slice, dtype: torch.dtype
) -> Tensor:
    every_SGK = cache_RCGK.view(-1, *cache_RCGK.shape[2:])
    if scale is None:
        return rounded(every_SGK[slots_S], dtype)
    # PyTorch gathers no FP8 on every device, but bytes
    codes_SGK = every_SGK.view(torch.uint8)[slots_S].view(cache_RCGK.dtype)
    return codes_SGK.to(dtype) * scale.to(dtype)[:, None]


@dataclass(frozen=True)
class LaunchConfig:
    """Tiles of packed rows per kv head, and a tile: packed rows by keys by head dimension."""

    m_tiles: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def _launch_config(
    target: Target, max_rows: int, ratio: int, head_dim: int, itemsize: int
) -> LaunchConfig:
    """64 packed rows by 64 keys; 16 in float32, whose products take many registers.

    Fewer than 64 rows take the same tile: Hopper multiplies 64 at a time, keys and not arithmetic
    are the limit then, and a row gets the same bits whether it is decoded alone or verified with
    others. Four warps let two programs share an SM; eight where four spill registers: with "mma"
    all operands lie in them, with "tcgen05" whole tiles of scores pass through them, which heads of
    64 compile badly. Not yet measured on a GPU.
    """
    block_k = max(16, triton.next_power_of_2(head_dim))
    m_tiles = triton.cdiv(max_rows * ratio, 64)
    if itemsize == 4:
        return LaunchConfig(m_tiles, 64, 16, block_k, num_warps=8, num_stages=2)
    is_narrow = target.unit == "tcgen05" and block_k <= 64
    warps = 8 if is_narrow or target.unit == "mma" else 4
    stages = min(4 if is_narrow else 3, target.most_stages)
    return LaunchConfig(m_tiles, 64, 64, block_k, warps, stages)


@torch.library.custom_op("aerie::tree_attention", mutates_args=())
def _tree_attention_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    row_starts: Tensor,
    prefix_lengths: Tensor,
    page_table: Tensor,
    ancestors: Tensor | None,
    max_rows: int,
    chunk_size: int | None,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    check_launchable(q)
    (num_rows, heads, head_dim), sequences = q.shape, prefix_lengths.numel()
    _, page_size, kv_heads, _ = k_cache.shape
    ratio, capacity = heads // kv_heads, page_table.shape[1] * page_size
    config = _launch_config(target_of(q), max_rows, ratio, head_dim, q.element_size())
    groups, m_tiles = kv_heads * sequences, config.m_tiles
    splits = num_splits or split_count(m_tiles, groups, capacity, chunk_size, max_rows)
    if not q.is_cuda:
        rows = TreeRows(positions, row_starts, prefix_lengths, page_table, ancestors, max_rows)
        check_values(rows, num_rows, len(k_cache), page_size, chunk_size)
    if num_rows == 0 or sequences == 0:
        return q.new_zeros(q.shape)
    if splits > 1:
        out = q.new_empty(q.shape)
        partials = q.new_empty(splits, *q.shape, dtype=torch.float32)
        lse = q.new_empty(splits, num_rows, heads, dtype=torch.float32)
    else:
        partials = lse = out = q.new_zeros(q.shape)  # rows of no sequence are zero
    _tree_attention_kernel[(m_tiles, groups, splits)](
        q,
        k_cache,
        v_cache,
        q if k_scale is None else k_scale,
        q if v_scale is None else v_scale,
        positions,
        row_starts,
        prefix_lengths,
        page_table,
        positions if ancestors is None else ancestors,
        partials,
        lse,
        q.stride(0),
        q.stride(1),
        page_table.stride(0),
        scale_stride(k_scale),
        scale_stride(v_scale),
        kv_heads,
        num_rows * heads,
        scale,
        RATIO=ratio,
        K=head_dim,
        PAGE_SIZE=page_size,
        CHUNK_SIZE=chunk_size or 0,
        HAS_ANCESTORS=ancestors is not None,
        HAS_SCALES=k_scale is not None,
        SPLIT=splits > 1,
        KV_POLICY="evict_first" if m_tiles == 1 else "",
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        _merge(partials, lse, row_starts, out)
    return out


def _merge(partials: Tensor, lse: Tensor, row_starts: Tensor, out: Tensor) -> None:
    """The shares [S, T, H, K] into `out`; rows of no sequence become zero."""
    splits, num_rows, heads, head_dim = partials.shape
    _tree_attention_merge_kernel[(num_rows * heads,)](
        partials,
        lse,
        row_starts,
        out,
        num_rows * heads,
        row_starts.numel() - 1,
        splits,
        heads,
        K=head_dim,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_K=max(16, triton.next_power_of_2(head_dim)),
        num_warps=4,
    )


@_tree_attention_op.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def tree_attention(
    q_THK: Tensor,
    k_cache_RCGK: Tensor,
    v_cache_RCGK: Tensor,
    rows: TreeRows,
    chunk_size: int | None,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of every row of the step; returns [T, H, K], zeros for rows of no sequence.

    K is 16 to 128, pages hold a power of two of tokens, and a tree has at most 64 rows a sequence.
    The caches already hold the keys and values of the new rows; FP8 caches (float8_e4m3fn) come
    with `k_scale` and `v_scale`, float32 [G] or [1]. `num_splits` pins the number of shares of the
    keys, which is otherwise chosen from the shapes.

    Raises ValueError on a shape, dtype, device or layout the kernels would read wrongly and, for
    tensors on the CPU, on row starts, lengths, positions, ancestor words and used pages that
    contradict each other. On a GPU these numbers are not read: a wrong page reads foreign memory.
    """
    check_call(q_THK, k_cache_RCGK, v_cache_RCGK, rows, chunk_size, num_splits)
    check_scales(k_cache_RCGK, k_scale, v_scale)
    return _tree_attention_op(
        q_THK,
        k_cache_RCGK,
        v_cache_RCGK,
        rows.positions_T,
        rows.row_starts_B1,
        rows.prefix_lengths_B,
        rows.page_table_BM,
        rows.ancestors_T,
        rows.max_rows,
        chunk_size,
        scale,
        k_scale,
        v_scale,
        num_splits,
    )
