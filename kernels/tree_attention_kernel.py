"""The kernels of `tree_attention`: rows against one share of their keys, and the sum of the shares.

A program does `BLOCK_M` packed rows of one sequence and one kv head. It finds its share of the keys
from the lengths on the device; a share without keys stores a log-sum-exp of -inf and leaves.

A second kernel merges the shares, a program per row and head. The last program to arrive could do
it without that launch, but it alone would read up to 64 rows of 32 shares, 1 MiB, at the pace of
one SM. Not yet measured on a GPU.

Letters: as in `tree_attention`; S shares, and a packed row m is a pair of a row and a query head.
"""

import triton
import triton.language as tl

from aerie.kernels.tree_attention_ranges import seen_slots, share_of
from aerie.kernels.tree_attention_tiles import (
    add_spoilt,
    attend_edges,
    attend_full,
    fitted,
    words_in_chunk,
)

LOG2_E = tl.constexpr(1.4426950408889634)
SPOILT_KEYS = tl.constexpr(16)  # a tile of the rare walk: small, as registers are short


@triton.jit(do_not_specialize=["stride_pb", "num_heads"])
def _tree_attention_kernel(
    q_ptr,  # [T, H, K]
    k_cache_ptr,  # [R, C, G, K]
    v_cache_ptr,  # [R, C, G, K]
    k_scale_ptr,  # [G] or [1], read if HAS_SCALES
    v_scale_ptr,  # [G] or [1], read if HAS_SCALES
    positions_ptr,  # [T]
    row_starts_ptr,  # [B + 1]
    prefix_lengths_ptr,  # [B]
    page_table_ptr,  # [B, M]
    ancestors_ptr,  # [T], read if HAS_ANCESTORS
    out_ptr,  # [T, H, K], or float32 [S, T, H, K] if SPLIT
    lse_ptr,  # [S, T, H], base 2, written if SPLIT
    stride_qt,
    stride_qh,
    stride_pb,
    stride_ks,
    stride_vs,
    G,
    num_heads,  # T * H
    scale,
    RATIO: tl.constexpr,  # query heads per kv head
    K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHUNK_SIZE: tl.constexpr,  # 0: no chunks
    HAS_ANCESTORS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
    KV_POLICY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    EDGE_N: tl.constexpr = max(16, BLOCK_N // 2)  # pyright: ignore
    head, b = (tl.program_id(1) % G).to(tl.int64), (tl.program_id(1) // G).to(tl.int64)
    row_start = tl.load(row_starts_ptr + b).to(tl.int64)
    num_rows = (tl.load(row_starts_ptr + b + 1) - row_start).to(tl.int32)
    if tl.program_id(0) * BLOCK_M >= num_rows * RATIO:
        return
    prefix = tl.load(prefix_lengths_ptr + b).to(tl.int32)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = m // RATIO, head * RATIO + m % RATIO
    is_row = t < num_rows
    row = row_start + t
    k = tl.arange(0, BLOCK_K)

    first, last, all_from, all_to, lowest = seen_slots(
        positions_ptr + row, is_row, prefix, num_rows, CHUNK_SIZE, HAS_ANCESTORS, RATIO, BLOCK_M
    )
    begin, end, full_from, full_to = share_of(first, last, all_from, all_to, BLOCK_N)
    lse_row_ptr = lse_ptr + tl.program_id(2).to(tl.int64) * num_heads + row * (G * RATIO) + h
    if SPLIT and begin >= end:
        tl.store(lse_row_ptr, -float("inf"), mask=is_row)
        return
    word = tl.zeros([BLOCK_M], tl.int64)
    if HAS_ANCESTORS:
        in_tail = is_row & (tl.zeros_like(t) + end > prefix)  # other shares see the prefix alone
        word = tl.load(ancestors_ptr + row, mask=in_tail, other=0)
        if CHUNK_SIZE > 0:
            word = words_in_chunk(word, lowest, positions_ptr + row_start, num_rows)

    q_row_ptr = q_ptr + (row * stride_qt + h * stride_qh)[:, None]
    in_rows = is_row[:, None] & (k < K)[None, :]
    q = tl.load(q_row_ptr + k[None, :], mask=in_rows, other=0.0)
    factor = tl.full([BLOCK_M], LOG2_E, tl.float32) * scale
    if HAS_SCALES:
        q, factor = fitted(q, factor * tl.load(k_scale_ptr + head * stride_ks))
    query = (q, factor, q_row_ptr, is_row[:, None])
    k_ptr, v_ptr = k_cache_ptr + head * K, v_cache_ptr + head * K
    pages_ptr = page_table_ptr + b * stride_pb
    state = (
        tl.zeros([BLOCK_M, BLOCK_K], tl.float32),
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    state = attend_full(
        query, state, k_ptr, v_ptr, pages_ptr, full_from, full_to, G * K,
        K, PAGE_SIZE, KV_POLICY, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    full_length = tl.maximum(full_to - full_from, 0)
    state, is_spoilt = attend_edges(
        query, state, k_ptr, v_ptr, pages_ptr, word, t, lowest, prefix, first, last, begin, end,
        full_from, full_length, G * K, K, PAGE_SIZE, HAS_ANCESTORS, EDGE_N, BLOCK_K,
    )  # fmt: skip
    accumulator, maximum, total = state
    accumulator = add_spoilt(
        query, accumulator, maximum, k_ptr, v_ptr, pages_ptr, word, t, lowest, prefix, first, last,
        begin, tl.where(is_spoilt, end, begin + full_length), full_from, full_length, G * K,
        K, PAGE_SIZE, HAS_ANCESTORS, SPOILT_KEYS, BLOCK_K,
    )  # fmt: skip
    out = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
    if HAS_SCALES:
        out *= tl.load(v_scale_ptr + head * stride_vs)
    out_row = row * (G * RATIO) + h
    if SPLIT:
        tl.store(lse_row_ptr, maximum + tl.log2(total), mask=is_row)
        out_row += tl.program_id(2).to(tl.int64) * num_heads
    tl.store(out_ptr + (out_row * K)[:, None] + k[None, :], out, mask=in_rows)


@triton.jit(do_not_specialize=["num_heads", "B", "S"])
def _tree_attention_merge_kernel(
    partials_ptr,  # [S, T, H, K]
    lse_ptr,  # [S, T, H]
    row_starts_ptr,  # [B + 1]
    out_ptr,  # [T, H, K]
    num_heads,  # T * H
    B,
    S,
    H,
    K: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)  # of all heads of all rows
    row = head // H
    is_row = (row >= tl.load(row_starts_ptr)) & (row < tl.load(row_starts_ptr + B))
    s, k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    cell = s.to(tl.int64) * num_heads + head
    lse = tl.load(lse_ptr + cell, mask=s < tl.where(is_row, S, 0), other=-float("inf"))
    maximum = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(maximum == -float("inf"), 0.0, maximum))
    written = (lse != -float("inf"))[:, None] & (k < K)[None, :]
    partial = tl.load(partials_ptr + (cell * K)[:, None] + k[None, :], mask=written, other=0.0)
    total = tl.sum(weight, axis=0)
    out = tl.sum(partial * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + head * K + k, out, mask=k < K)
