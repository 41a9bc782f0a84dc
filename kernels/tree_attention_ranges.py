"""Which logical slots a program of `tree_attention` reads, found from the lengths on the device.

Letters: as in `tree_attention`; N keys of a tile, M packed rows of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def rounded_up(x, STEP: tl.constexpr):
    return x + (STEP - 1) - (x + (STEP - 1)) % STEP


@triton.jit
def seen_slots(
    position_ptr, is_row, prefix, num_rows,
    CHUNK_SIZE: tl.constexpr, HAS_ANCESTORS: tl.constexpr, RATIO: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Slots [first, last) that some row of the tile may see, [all_from, all_to) that all see, and

    per row the lowest slot of its chunk.
    """
    first_t = tl.program_id(0) * BLOCK_M // RATIO
    last_t = (tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // RATIO
    first, all_from = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    lowest = tl.zeros([BLOCK_M], tl.int32)
    if CHUNK_SIZE > 0:
        position = tl.load(position_ptr, mask=is_row, other=0).to(tl.int32)
        lowest = position - position % CHUNK_SIZE
        first += tl.min(tl.where(is_row, lowest, prefix + num_rows), axis=0)
        all_from += tl.max(tl.where(is_row, lowest, 0), axis=0)
    if HAS_ANCESTORS:
        last, all_to = prefix + num_rows, prefix
    else:
        last, all_to = prefix + tl.minimum(num_rows, last_t + 1), prefix + first_t + 1
    return first, last, all_from, all_to, lowest


@triton.jit
def share_of(first, last, all_from, all_to, BLOCK_N: tl.constexpr):
    """The share [begin, end) of this program, and in it the whole tiles that every row sees."""
    base = first - first % BLOCK_N  # tiles start at multiples of BLOCK_N: one page may hold them
    share = rounded_up(tl.cdiv(last - base, tl.num_programs(2)), BLOCK_N)
    begin = base + (tl.program_id(2).to(tl.int64) * share).to(tl.int32)
    end = tl.minimum(begin + share, last)
    full_from = tl.maximum(begin, rounded_up(all_from, BLOCK_N))
    full_to = tl.minimum(end, all_to)
    return begin, end, full_from, full_to - full_to % BLOCK_N
