"""Search for a boundary in the order of a row's logits, the walks that `row_filter` is made of.

The bits of a float32, read as an integer with the magnitude of a negative number turned round, rise
with the number. So a boundary is found by bisection over integers, exactly, in at most 32 walks.
Masses are integers in units of 2^-44 of the largest: their sum is the same in every order.

Letters: V target vocabulary.
"""

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**44)


@triton.jit
def load_ordered(row_ptr, v, V, SHIFT: tl.constexpr):
    """Logits and their order as int32: the bits of a float, without the `SHIFT` that are unused."""
    logit = tl.load(row_ptr + v, mask=v < V, other=-float("inf")).to(tl.float32)
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 ties with 0
    return logit, (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def fixed_mass(logit, maximum, scale):
    return (tl.exp((logit - maximum) * scale) * UNIT).to(tl.int64)


@triton.jit
def above(row_ptr, V, order, maximum, scale, SHIFT: tl.constexpr, BLOCK_V: tl.constexpr):
    """Count and mass of the logits above `order`, and the mass of one logit at it."""
    count, mass = tl.zeros([BLOCK_V], tl.int32), tl.zeros([BLOCK_V], tl.int64)
    one = tl.zeros([BLOCK_V], tl.int64)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logit, own = load_ordered(row_ptr, v, V, SHIFT)
        q = fixed_mass(logit, maximum, scale)
        is_above = (own > order) & (v < V)
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, q, 0)
        one = tl.maximum(one, tl.where((own == order) & (v < V), q, 0))
    return tl.sum(count, axis=0), tl.sum(mass, axis=0), tl.max(one, axis=0)


@triton.jit
def lowest_order(row_ptr, V, low, high, k, share, maximum, scale, SHIFT: tl.constexpr,
            BLOCK_V: tl.constexpr):  # fmt: skip
    """Lowest order that has fewer than `k` logits and less mass than `share` above it."""
    while low < high:
        middle = (low + high) >> 1
        count, mass, _ = above(
            row_ptr, V, middle.to(tl.int32), maximum, scale, SHIFT, BLOCK_V
        )  # fmt: skip
        fits = (count < k) & (mass < share)
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return high
