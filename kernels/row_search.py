"""Search for a boundary in the order of a row's logits, in walks that many programs share.

The bits of a float32, read as an integer with the magnitude of a negative number turned round, rise
with the number. So a boundary is found digit by digit from the top, exactly: a walk counts the
logits of every next digit under the digits found so far, and sums their masses. A program walks one
share of a row; every program of the next launch adds the counts of all shares and so knows the
digit. Masses are integers in units of 2^-44 of the largest, so their sum is the same in every order
and no boundary depends on how a row is cut.

Letters: T rows, V target vocabulary, S shares of a row.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**44)
ENDLESS = tl.constexpr(2**63 - 1)


@triton.jit
def load_ordered(row_ptr, v, V, SHIFT: tl.constexpr):
    """Logits and their order as int32: the bits of a float, without the `SHIFT` that are unused."""
    logit = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 ties with 0
    return logit, (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def ordered_logit(order, SHIFT: tl.constexpr):
    """The logit of an order."""
    ordered = (order << SHIFT) | tl.where(order < 0, (1 << SHIFT) - 1, 0)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def fixed_mass(logit, maximum, scale):
    return (tl.exp((logit - maximum) * scale) * UNIT).to(tl.int64)


@triton.jit
def share_of(s, size, V):
    """First id of share `s` and the one after its last."""
    begin = (s.to(tl.int64) * size).to(tl.int32)
    return begin, tl.minimum(begin + size, V)


@triton.jit
def row_limits(
    maxima_ptr, temperature_ptr, top_k_ptr, t, num_shares, V, HAS_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Maximum of a row, whether it is legal, 1 / temperature, and how many logits to keep."""
    s = tl.arange(0, BLOCK_S)
    in_row = s < num_shares
    maxima = tl.load(maxima_ptr + t * num_shares + s, mask=in_row, other=-float("inf"))
    has_nan = tl.sum((maxima != maxima).to(tl.int32), axis=0) > 0
    maximum = tl.max(tl.where(maxima == maxima, maxima, -float("inf")), axis=0)
    is_legal = (has_nan == 0) & (tl.abs(maximum) < float("inf"))
    temperature = tl.load(temperature_ptr + t).to(tl.float32)
    is_greedy = (temperature == 0.0) | (is_legal == 0)  # an illegal row needs no search
    # a draw is the same on every device: `/` is approximate on a GPU
    scale = tl.div_rn(1.0, tl.where(is_greedy, 1.0, temperature))
    k = V
    if HAS_K:
        asked = tl.load(top_k_ptr + t)
        k = tl.where((asked > 0) & (asked < V), asked, V).to(tl.int32)
    return maximum, is_legal, is_greedy, scale, tl.where(is_greedy, 1, k)


@triton.jit
def descended(
    found_ptr,  # [T, 3]: digits so far, count and mass above them
    counts_ptr,  # [T, S, BINS], of every next digit under those
    masses_ptr,  # [T, S, BINS]
    t,
    num_shares,
    k,
    limit,
    BINS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One digit more, the lowest that has fewer than `k` logits and less mass than `limit` above
    it; and the count and the mass above it."""
    s, digit = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, BINS)
    cell = (t * num_shares + s) * BINS + digit[None, :]
    counts = tl.sum(tl.load(counts_ptr + cell, mask=s < num_shares, other=0), axis=0)
    masses = tl.sum(tl.load(masses_ptr + cell, mask=s < num_shares, other=0), axis=0)
    counts_above = tl.load(found_ptr + t * 3 + 1) + tl.sum(counts, axis=0) - tl.cumsum(counts)
    masses_above = tl.load(found_ptr + t * 3 + 2) + tl.sum(masses, axis=0) - tl.cumsum(masses)
    fits = (counts_above < k) & (masses_above < limit)
    next_digit = tl.min(tl.where(fits, digit, BINS - 1), axis=0)
    is_next = digit == next_digit
    count = tl.sum(tl.where(is_next, counts_above, 0), axis=0)
    mass = tl.sum(tl.where(is_next, masses_above, 0), axis=0)
    return tl.load(found_ptr + t * 3) * BINS + next_digit, count, mass


@triton.jit
def order_of(digits, SHIFT: tl.constexpr):
    """All digits together are an order from 0; an order itself is signed."""
    return (digits - (1 << (31 - SHIFT))).to(tl.int32)


@triton.jit
def _row_maxima_kernel(
    logits_ptr,  # [T, V]
    maxima_ptr,  # [T, S], NaN if a logit of the share is
    firsts_ptr,  # [T, S], the lowest id with the maximum
    stride_lt,
    V,
    size,  # of a share
    BLOCK_V: tl.constexpr,
):
    t, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr = logits_ptr + t * stride_lt
    maximum = tl.full([BLOCK_V], -float("inf"), tl.float32)
    first = tl.full([BLOCK_V], 2**31 - 1, tl.int32)
    num_nan = tl.zeros([BLOCK_V], tl.int32)
    begin, end = share_of(s, size, V)
    for start in range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logit = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
        num_nan += (logit != logit).to(tl.int32)
        first = tl.where(logit > maximum, v, first)
        maximum = tl.where(logit > maximum, logit, maximum)
    best = tl.max(maximum, axis=0)
    first = tl.min(tl.where(maximum == best, first, 2**31 - 1), axis=0)
    best = tl.where(tl.sum(num_nan, axis=0) > 0, float("nan"), best)
    tl.store(maxima_ptr + t * tl.num_programs(1) + s, best)
    tl.store(firsts_ptr + t * tl.num_programs(1) + s, first)


@triton.jit(do_not_specialize=["below"])
def _row_digits_kernel(
    logits_ptr,  # [T, V]
    maxima_ptr,  # [T, S]
    temperature_ptr,  # [T]
    top_k_ptr,  # [T], read if HAS_K
    limit_ptr,  # [T], read if HAS_LIMIT: the mass above a boundary is below it
    found_before_ptr,  # as in `descended`, of the walk before, as the two below
    counts_before_ptr,
    masses_before_ptr,
    found_ptr,  # of this walk, as the two below
    counts_ptr,
    masses_ptr,
    stride_lt,
    V,
    size,
    below,  # bits of the digits that come after this walk's
    IS_FIRST: tl.constexpr,
    DIGIT: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    BINS: tl.constexpr = 1 << DIGIT  # pyright: ignore
    t, s, num_shares = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row_ptr = logits_ptr + t * stride_lt
    maximum, _, _, scale, k = row_limits(
        maxima_ptr, temperature_ptr, top_k_ptr, t, num_shares, V, HAS_K, BLOCK_S
    )
    digits, count, mass = tl.zeros([], tl.int64), tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    if not IS_FIRST:
        limit = tl.load(limit_ptr + t) if HAS_LIMIT else ENDLESS
        digits, count, mass = descended(
            found_before_ptr, counts_before_ptr, masses_before_ptr, t, num_shares, k, limit,
            BINS, BLOCK_S,
        )  # fmt: skip
    tl.store(found_ptr + t * 3, digits, mask=s == 0)
    tl.store(found_ptr + t * 3 + 1, count, mask=s == 0)
    tl.store(found_ptr + t * 3 + 2, mass, mask=s == 0)
    digit = tl.arange(0, BINS)[None, :]
    counts = tl.zeros([BLOCK_V, BINS], tl.int32)
    masses = tl.zeros([BLOCK_V, BINS], tl.int64)
    begin, end = share_of(s, size, V)
    for start in range(begin, end, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logit, order = load_ordered(row_ptr, v, V, SHIFT)
        own = (order.to(tl.int64) + (1 << (31 - SHIFT))) >> below
        own = tl.where((v < end) & (own >> DIGIT == digits), own & (BINS - 1), -1)
        is_digit = own[:, None] == digit
        counts += is_digit.to(tl.int32)
        masses += tl.where(is_digit, fixed_mass(logit, maximum, scale)[:, None], 0)
    cell = (t * num_shares + s) * BINS + tl.arange(0, BINS)
    tl.store(counts_ptr + cell, tl.sum(counts, axis=0))
    tl.store(masses_ptr + cell, tl.sum(masses, axis=0))
