"""Attention of the rows of one step over a paged cache, under a tree of ancestors.

    o_t = softmax_s(scale * q_t . k_s) V            over the keys s that row t may see

Row t of sequence b sees the committed prefix and, of the new rows of b, its ancestors and itself
(or every row up to itself, if the step is a chain); with a chunk size (Llama 4's local layers) only
keys at positions >= floor(position_t / chunk) * chunk. That bound differs between the rows of one
tree that straddles a chunk edge, as positions follow the depth and not the slot (contract 6.3).

Keys and values of new row j already lie in logical slot prefix_length + j. The query heads that
share a kv head are packed with the rows into one tile (row t*(H/G) + g), so each key is read once
per tile. Scores, softmax and the sum are float32; the weights are rounded to the dtype of the
values they multiply, as in FlashAttention.

Letters: B sequences, T rows, N rows of one sequence, S keys, H query heads, G kv heads, K head
dimension, R pages in the pool, C tokens per page, M pages per sequence.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable, rounded, widened

MAX_TREE_ROWS = 64  # bits of an ancestor word
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128  # of the Triton kernel


@dataclass(frozen=True, eq=False)
class TreeRows:
    """Where the T query rows of one step stand. All layers of the step share one instance."""

    positions_T: Tensor  # int64, prefix + depth, not the slot; consecutive if ancestors_T is None
    row_starts_B1: Tensor  # int32, rows of sequence b are row_starts[b] : row_starts[b + 1]
    prefix_lengths_B: Tensor  # int32, keys already committed in the cache
    page_table_BM: Tensor  # int32, page of every C logical slots; unused entries may hold anything
    ancestors_T: Tensor | None  # int64, bit j = sees new row j of its sequence; None = causal
    max_rows: int  # host bound on the rows of a sequence: the grid's size
    _seen: dict = field(default_factory=dict, init=False, repr=False)  # memo of `_seen_keys`


@dataclass(frozen=True)
class _SeenKeys:
    """What the rows of one sequence read: slots, and an additive mask unless all see all."""

    rows: slice
    slots: Tensor | slice  # flat; a slice where they follow each other, which needs no gather
    bias_NS: Tensor | None


def tree_attention_ref(
    q_THK: Tensor,
    k_cache_RCGK: Tensor,
    v_cache_RCGK: Tensor,
    rows: TreeRows,
    chunk_size: int | None,
    scale: float,
) -> Tensor:
    """Per sequence: gather its keys, then dense attention under an explicit mask, in float32."""
    sequences = _seen_keys(rows, k_cache_RCGK.shape[1], chunk_size)
    if [seen.rows for seen in sequences] == [slice(0, len(q_THK))]:
        return _attend_ref(q_THK, k_cache_RCGK, v_cache_RCGK, sequences[0], scale)
    out_THK = torch.zeros_like(q_THK)
    for seen in sequences:
        q_NHK = q_THK[seen.rows]
        out_THK[seen.rows] = _attend_ref(q_NHK, k_cache_RCGK, v_cache_RCGK, seen, scale)
    return out_THK


def _attend_ref(
    q_NHK: Tensor, k_cache_RCGK: Tensor, v_cache_RCGK: Tensor, seen: _SeenKeys, scale: float
) -> Tensor:
    k_GSK, v_GSK = (
        widened(cache.view(-1, *cache.shape[2:])[seen.slots]).transpose(0, 1)
        for cache in (k_cache_RCGK, v_cache_RCGK)
    )
    out_1HNK = F.scaled_dot_product_attention(
        widened(q_NHK).transpose(0, 1)[None],
        k_GSK[None],
        v_GSK[None],
        attn_mask=seen.bias_NS,
        scale=scale,
        enable_gqa=True,
    )
    return rounded(out_1HNK[0].transpose(0, 1), q_NHK.dtype)


def _seen_keys(rows: TreeRows, page_size: int, chunk_size: int | None) -> list[_SeenKeys]:
    """Built once per step and chunk size, then shared by all layers."""
    if (page_size, chunk_size) not in rows._seen:
        starts, prefixes = rows.row_starts_B1.tolist(), rows.prefix_lengths_B.tolist()
        rows._seen[page_size, chunk_size] = [
            _seen_by_sequence(rows, b, slice(*starts[b : b + 2]), prefix, page_size, chunk_size)
            for b, prefix in enumerate(prefixes)
            if starts[b] < starts[b + 1]
        ]
    return rows._seen[page_size, chunk_size]


def _seen_by_sequence(
    rows: TreeRows, b: int, own: slice, prefix: int, page_size: int, chunk_size: int | None
) -> _SeenKeys:
    """The root stands at position `prefix`, so no row looks further back than its chunk."""
    end = prefix + own.stop - own.start
    first = 0 if chunk_size is None else prefix // chunk_size * chunk_size
    logical_S = torch.arange(first, end, device=rows.positions_T.device)
    bias_NS = None
    if own.stop - own.start > 1:
        visible_NS = _visible(rows, own, prefix - first, logical_S, chunk_size)
        bias_NS = torch.zeros_like(visible_NS, dtype=torch.float32)
        bias_NS.masked_fill_(~visible_NS, -torch.inf)
    return _SeenKeys(own, _flat_slots(rows.page_table_BM[b], logical_S, first, page_size), bias_NS)


def _flat_slots(table_M: Tensor, logical_S: Tensor, first: int, page_size: int) -> Tensor | slice:
    pages = table_M[first // page_size : (first + len(logical_S) - 1) // page_size + 1]
    numbers = pages.tolist()
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        start = numbers[0] * page_size + first % page_size
        return slice(start, start + len(logical_S))
    return table_M[logical_S // page_size].long() * page_size + logical_S % page_size


def _visible(
    rows: TreeRows, own: slice, num_prefix: int, logical_S: Tensor, chunk_size: int | None
) -> Tensor:
    position_N = rows.positions_T[own]
    j_N = torch.arange(position_N.numel(), device=position_N.device)
    if rows.ancestors_T is None:
        related_NN = j_N <= j_N[:, None]
    else:
        related_NN = (rows.ancestors_T[own][:, None] >> j_N) & 1 == 1
    visible_NS = F.pad(related_NN, (num_prefix, 0), value=True)
    if chunk_size is not None:
        key_position_S = torch.cat([logical_S[:num_prefix], position_N])
        visible_NS = visible_NS & (
            key_position_S >= (position_N // chunk_size * chunk_size)[:, None]
        )
    return visible_NS


@triton.jit
def _attend(
    state,
    q,
    k_ptr,  # [R, C, G, K] at this kv head
    v_ptr,  # [R, C, G, K] at this kv head
    pages_ptr,  # [M] of this sequence
    slot,  # logical
    read,
    visible,
    stride_slot,
    K,
    scale,
    PAGE_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One online-softmax step over the keys of a tile; `read` masks keys that no row may see."""
    accumulator, maximum, total = state
    k = tl.arange(0, BLOCK_K)
    page = tl.load(pages_ptr + slot // PAGE_SIZE, mask=read, other=0).to(tl.int64)
    offset = ((page * PAGE_SIZE + slot % PAGE_SIZE) * stride_slot)[:, None] + k[None, :]
    # unread values must be zero, as their weight is: 0 * NaN is NaN
    loaded = read[:, None] & (k < K)[None, :]
    key = tl.load(k_ptr + offset, mask=loaded, other=0.0)
    value = tl.load(v_ptr + offset, mask=loaded, other=0.0)
    scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(visible, scores, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # a row that has seen no key yet: -inf - -inf would be NaN
    shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    weights = tl.exp(scores - shift[:, None])
    decay = tl.exp(maximum - shift)
    total = total * decay + tl.sum(weights, axis=1)
    accumulator = accumulator * decay[:, None]
    accumulator += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return accumulator, new_maximum, total


@triton.jit(do_not_specialize=["stride_pb"])
def _tree_attention_kernel(
    q_ptr,  # [T, H, K]
    k_cache_ptr,  # [R, C, G, K]
    v_cache_ptr,  # [R, C, G, K]
    positions_ptr,  # [T]
    row_starts_ptr,  # [B + 1]
    prefix_lengths_ptr,  # [B]
    page_table_ptr,  # [B, M]
    ancestors_ptr,  # [T], read if HAS_ANCESTORS
    out_ptr,  # [T, H, K]
    stride_qt,
    stride_qh,
    stride_pb,
    G,
    K,
    scale,
    RATIO: tl.constexpr,  # query heads per kv head
    PAGE_SIZE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,  # 0: no chunks
    HAS_ANCESTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row_start = tl.load(row_starts_ptr + b).to(tl.int64)
    num_rows = (tl.load(row_starts_ptr + b + 1) - row_start).to(tl.int32)
    if tl.program_id(0) * BLOCK_M >= num_rows * RATIO:
        return
    prefix = tl.load(prefix_lengths_ptr + b).to(tl.int32)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = m // RATIO, head * RATIO + m % RATIO
    k = tl.arange(0, BLOCK_K)
    is_row = t < num_rows
    in_out = is_row[:, None] & (k < K)[None, :]
    q_offset = (row_start + t) * stride_qt + h * stride_qh
    q = tl.load(q_ptr + q_offset[:, None] + k[None, :], mask=in_out, other=0.0)

    position = tl.load(positions_ptr + row_start + t, mask=is_row, other=0).to(tl.int32)
    lowest = tl.zeros([BLOCK_M], tl.int32)
    first = tl.zeros([], tl.int32)
    if CHUNK_SIZE > 0:
        lowest = position // CHUNK_SIZE * CHUNK_SIZE
        first = tl.min(tl.where(is_row, lowest, prefix + num_rows), axis=0)

    k_ptr, v_ptr = k_cache_ptr + head * K, v_cache_ptr + head * K
    pages_ptr = page_table_ptr + b * stride_pb
    state = (
        tl.zeros([BLOCK_M, BLOCK_K], tl.float32),
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    n = tl.arange(0, BLOCK_N)
    for start in range(first, prefix, BLOCK_N):
        slot = start + n
        read = slot < prefix
        visible = is_row[:, None] & read[None, :] & (slot[None, :] >= lowest[:, None])
        state = _attend(
            state,
            q,
            k_ptr,
            v_ptr,
            pages_ptr,
            slot,
            read,
            visible,
            G * K,
            K,
            scale,
            PAGE_SIZE,
            BLOCK_K,
        )
    first_new, end_new = tl.zeros([], tl.int32), num_rows
    if not HAS_ANCESTORS:
        first_new = tl.maximum(first - prefix, 0)  # the positions of a chain are its slots
        end_new = tl.minimum(end_new, tl.max(t, axis=0) + 1)
    for start in range(first_new, end_new, BLOCK_N):
        j = start + n
        is_new = j < num_rows
        if HAS_ANCESTORS:
            word = tl.load(ancestors_ptr + row_start + t, mask=is_row, other=0)
            related = ((word[:, None] >> (j % 64)[None, :]) & 1) == 1
        else:
            related = j[None, :] <= t[:, None]
        key_position = tl.load(positions_ptr + row_start + j, mask=is_new, other=0).to(tl.int32)
        visible = is_row[:, None] & is_new[None, :] & related
        visible = visible & (key_position[None, :] >= lowest[:, None])
        read = tl.max(visible.to(tl.int32), axis=0) > 0
        state = _attend(
            state,
            q,
            k_ptr,
            v_ptr,
            pages_ptr,
            prefix + j,
            read,
            visible,
            G * K,
            K,
            scale,
            PAGE_SIZE,
            BLOCK_K,
        )
    accumulator, _, total = state
    out = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    out_offset = ((row_start + t) * (G * RATIO) + h) * K
    tl.store(out_ptr + out_offset[:, None] + k[None, :], out, mask=in_out)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of packed (row, query head) pairs by keys by head dimension."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def _launch_config(max_rows: int, ratio: int, head_dim: int, itemsize: int) -> LaunchConfig:
    """All packed rows in one tile up to 64 (32 in float32), 64 keys a tile, no split over the keys.

    Compiled for sm_90 at K = 128 no such tile spills; not yet measured on a GPU.
    """
    largest = 32 if itemsize == 4 else 64
    block_m = min(largest, max(16, triton.next_power_of_2(max_rows * ratio)))
    block_k = max(16, triton.next_power_of_2(head_dim))
    num_warps = 4 if block_m == 16 else 8
    return LaunchConfig(block_m, 64, block_k, num_warps, num_stages=2 if itemsize == 4 else 3)


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
) -> Tensor:
    check_launchable(q)
    _, page_size, kv_heads, head_dim = k_cache.shape
    ratio, sequences = q.shape[1] // kv_heads, prefix_lengths.numel()
    out = q.new_zeros(q.shape)  # rows of no sequence are padding and stay zero
    config = _launch_config(max_rows, ratio, head_dim, q.element_size())
    if q.shape[0] == 0 or sequences == 0:
        return out
    grid = (triton.cdiv(max_rows * ratio, config.BLOCK_M), kv_heads, sequences)
    _tree_attention_kernel[grid](
        q,
        k_cache,
        v_cache,
        positions,
        row_starts,
        prefix_lengths,
        page_table,
        positions if ancestors is None else ancestors,
        out,
        q.stride(0),
        q.stride(1),
        page_table.stride(0),
        kv_heads,
        head_dim,
        scale,
        RATIO=ratio,
        PAGE_SIZE=page_size,
        CHUNK_SIZE=chunk_size or 0,
        HAS_ANCESTORS=ancestors is not None,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


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
) -> Tensor:
    """Attention of every row of the step; returns [T, H, K], zeros for rows of no sequence.

    The caches already hold the keys and values of the new rows. Raises ValueError on a shape, dtype
    or layout the kernel would read wrongly.
    """
    _check_cache(q_THK, k_cache_RCGK, v_cache_RCGK)
    _check_rows(q_THK, rows)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: must be None or at least 1, got {chunk_size}")
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
    )


def _check_cache(q_THK: Tensor, k_cache_RCGK: Tensor, v_cache_RCGK: Tensor) -> None:
    in_range = MIN_HEAD_DIM <= q_THK.shape[-1] <= MAX_HEAD_DIM
    if q_THK.ndim != 3 or q_THK.stride(-1) != 1 or not in_range:
        raise ValueError(
            f"q_THK: must be [T, H, K] with a contiguous K of {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, "
            f"got shape {tuple(q_THK.shape)} strides {q_THK.stride()}"
        )
    for name, cache in (("k_cache_RCGK", k_cache_RCGK), ("v_cache_RCGK", v_cache_RCGK)):
        if cache.ndim != 4 or not cache.is_contiguous() or cache.shape[3] != q_THK.shape[2]:
            raise ValueError(
                f"{name}: must be a contiguous [R, C, G, {q_THK.shape[2]}], "
                f"got shape {tuple(cache.shape)} strides {cache.stride()}"
            )
    _, page_size, kv_heads, _ = k_cache_RCGK.shape
    if v_cache_RCGK.shape != k_cache_RCGK.shape or q_THK.shape[1] % kv_heads:
        raise ValueError(
            f"v_cache_RCGK, q_THK: must match k_cache_RCGK {tuple(k_cache_RCGK.shape)} (H a "
            f"multiple of G), got {tuple(v_cache_RCGK.shape)} and {q_THK.shape[1]} heads"
        )
    if page_size & (page_size - 1):
        raise ValueError(f"k_cache_RCGK: page size must be a power of two, got {page_size}")


def _check_rows(q_THK: Tensor, rows: TreeRows) -> None:
    per_row = {"positions_T": rows.positions_T, "ancestors_T": rows.ancestors_T}
    for name, x in per_row.items():
        if x is not None and (x.shape != q_THK.shape[:1] or x.dtype != torch.int64):
            raise ValueError(
                f"rows.{name}: must be int64 [{q_THK.shape[0]}], got {tuple(x.shape)} {x.dtype}"
            )
    sequences = rows.prefix_lengths_B.numel()
    if rows.row_starts_B1.numel() != sequences + 1 or rows.page_table_BM.shape[0] != sequences:
        raise ValueError(
            f"rows: row_starts_B1 and page_table_BM must fit {sequences} prefix lengths, "
            f"got {tuple(rows.row_starts_B1.shape)} and {tuple(rows.page_table_BM.shape)}"
        )
    if rows.max_rows < 1 or (rows.ancestors_T is not None and rows.max_rows > MAX_TREE_ROWS):
        raise ValueError(
            f"rows.max_rows: must be at least 1, and at most {MAX_TREE_ROWS} with ancestors, "
            f"got {rows.max_rows}"
        )
