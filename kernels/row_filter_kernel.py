"""What `row_filter` does with a boundary that `row_search` found: masses, last ids, thresholds.

Letters: T rows, V target vocabulary, S shares of a row.
"""

import triton
import triton.language as tl

from aerie.kernels.row_search import (
    ENDLESS,
    UNIT,
    descended,
    fixed_mass,
    load_ordered,
    order_of,
    ordered_logit,
    row_limits,
    share_of,
)


@triton.jit(do_not_specialize=["num_shares"])
def _row_limit_kernel(
    maxima_ptr,  # [T, S]
    temperature_ptr,  # [T]
    top_k_ptr,  # [T], read if HAS_K
    top_p_ptr,  # [T]
    found_ptr,  # as in `descended`, of the last walk for top-k, of the first walk without
    counts_ptr,
    masses_ptr,
    limit_ptr,  # [T]
    V,
    num_shares,
    HAS_K: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The mass that top-p wants of what top-k keeps."""
    t = tl.program_id(0).to(tl.int64)
    maximum, _, _, scale, k = row_limits(
        maxima_ptr, temperature_ptr, top_k_ptr, t, num_shares, V, HAS_K, BLOCK_S
    )
    if HAS_K:
        digits, count, mass = descended(
            found_ptr, counts_ptr, masses_ptr, t, num_shares, k, ENDLESS, BINS, BLOCK_S
        )
        one = fixed_mass(ordered_logit(order_of(digits, SHIFT), SHIFT), maximum, scale)
        total = mass + (k - count) * one
    else:
        cell = tl.arange(0, BLOCK_S)[:, None] * BINS + tl.arange(0, BINS)[None, :]
        masses_ptr += t * num_shares * BINS
        masses = tl.load(masses_ptr + cell, mask=cell < num_shares * BINS, other=0)
        total = tl.sum(tl.sum(masses, axis=1), axis=0)
    top_p = tl.load(top_p_ptr + t).to(tl.float64)
    limit = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
    tl.store(limit_ptr + t, tl.where(top_p < 1.0, limit, ENDLESS))


@triton.jit
def _row_filter_kernel(
    logits_ptr,  # [T, V]
    maxima_ptr,  # [T, S]
    firsts_ptr,  # [T, S]
    temperature_ptr,  # [T]
    top_k_ptr,  # [T], read if HAS_K
    limit_ptr,  # [T], read if HAS_P
    min_p_ptr,  # [T], read if HAS_MIN
    found_ptr,  # as in `descended`, of the last walk, as the two below; read if HAS_K or HAS_P
    counts_ptr,
    masses_ptr,
    lowest_ptr,  # [T, S], the smallest logit kept, as the two below
    last_ids_ptr,  # the highest id kept at the boundary, or -1
    kept_ptr,  # mass
    stride_lt,
    V,
    size,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_MIN: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """What one share of a row keeps."""
    t, s, num_shares = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row_ptr = logits_ptr + t * stride_lt
    maximum, _, is_greedy, scale, k = row_limits(
        maxima_ptr, temperature_ptr, top_k_ptr, t, num_shares, V, HAS_K, BLOCK_S
    )
    share = tl.arange(0, BLOCK_S)
    maxima = tl.load(maxima_ptr + t * num_shares + share, mask=share < num_shares, other=0.0)
    firsts = tl.load(firsts_ptr + t * num_shares + share, mask=share < num_shares, other=V)
    first = tl.min(tl.where(maxima == maximum, firsts, V), axis=0)
    order, num_ties, seen = -(2**31) >> SHIFT, 0, 0  # below every logit, -inf included
    if HAS_K or HAS_P:
        limit = tl.load(limit_ptr + t) if HAS_P else ENDLESS
        digits, count, mass = descended(
            found_ptr, counts_ptr, masses_ptr, t, num_shares, k, limit, BINS, BLOCK_S
        )
        order = order_of(digits, SHIFT)
        one = tl.maximum(fixed_mass(ordered_logit(order, SHIFT), maximum, scale), 1)
        num_ties = tl.minimum(k - count, (limit - mass - 1) // one + 1)
        cell = (t * num_shares + share) * BINS + digits % BINS
        seen = tl.sum(tl.load(counts_ptr + cell, mask=share < s, other=0), axis=0)

    least = tl.load(min_p_ptr + t).to(tl.float32) if HAS_MIN else 0.0
    last_id = tl.full([BLOCK_V], -1, tl.int32)
    lowest = tl.full([BLOCK_V], float("inf"), tl.float32)
    kept = tl.zeros([BLOCK_V], tl.int64)
    begin, end = share_of(s, size, V)
    for start in range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logit, own = load_ordered(row_ptr, v, V, SHIFT)
        is_tie = (own == order) & (v < end)
        rank = tl.cumsum(is_tie.to(tl.int32), axis=0) + seen
        seen += tl.sum(is_tie.to(tl.int32), axis=0)
        is_tie = tl.where(is_greedy, v == first, is_tie & (rank <= num_ties))
        is_kept = tl.where(is_greedy, is_tie, (own > order) | is_tie) & (v < end)
        is_kept &= tl.exp((logit - maximum) * scale) >= tl.minimum(least, 1.0)
        last_id = tl.maximum(last_id, tl.where(is_kept & is_tie, v, -1))
        lowest = tl.minimum(lowest, tl.where(is_kept, logit, float("inf")))
        kept += tl.where(is_kept, fixed_mass(logit, maximum, scale), 0)
    own_cell = t * num_shares + s
    tl.store(lowest_ptr + own_cell, tl.min(lowest, axis=0))
    tl.store(last_ids_ptr + own_cell, tl.max(last_id, axis=0))
    tl.store(kept_ptr + own_cell, tl.sum(kept, axis=0))


@triton.jit(do_not_specialize=["num_shares"])
def _row_filter_merge_kernel(
    maxima_ptr,  # [T, S], as the four below
    lowest_ptr,
    last_ids_ptr,
    kept_ptr,
    temperature_ptr,  # [T]
    maximum_ptr,  # [T], as the four below
    scale_ptr,
    threshold_ptr,
    last_id_ptr,
    log_mass_ptr,
    V,
    num_shares,
    BLOCK_S: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    maximum, is_legal, _, scale, _ = row_limits(
        maxima_ptr, temperature_ptr, temperature_ptr, t, num_shares, V, False, BLOCK_S
    )
    s = tl.arange(0, BLOCK_S)
    cell, in_row = t * num_shares + s, s < num_shares
    lowest = tl.load(lowest_ptr + cell, mask=in_row, other=float("inf"))
    last_id = tl.max(tl.load(last_ids_ptr + cell, mask=in_row, other=-1), axis=0)
    total = tl.sum(tl.load(kept_ptr + cell, mask=in_row, other=0), axis=0)
    tl.store(maximum_ptr + t, tl.where(is_legal, maximum, float("nan")))
    tl.store(scale_ptr + t, scale)
    tl.store(threshold_ptr + t, tl.min(lowest, axis=0))
    tl.store(last_id_ptr + t, tl.where(last_id == -1, V, last_id))  # -1: min-p cut above the ties
    tl.store(log_mass_ptr + t, tl.log(total.to(tl.float32) / UNIT))
