"""What the two grouped products of `experts` share: tiles, the K loop, and split depths.

A program has one tile of one expert (`expert_order.py`): a tile of weight rows is the left operand,
the pairs of that expert are its columns. A Hopper GPU multiplies 64 rows of the left operand at a
time, and FP8 codes on its FP8 units only from there; few tokens are too few rows, but not too few
columns. In a step of at most 64 pairs all pairs of an expert are one tile, so its weights are read
once: most tiles have at most `BLOCK_T` pairs, those with more take the branch for `WIDE_T`.

Hopper's FP8 units keep about 14 bits of a sum. So every step of 64 or 128 columns is summed apart
and added in float32, where the scale of a group or block is applied in the same instruction.
"""

import triton
import triton.language as tl

from aerie.kernels.quantize import _GROUP


@triton.jit
def tile_of(tiles_ptr, slots, row_tiles, GROUP_SLOTS: tl.constexpr):
    """Slot and weight tile of this program, and the slot's expert, first pair and count.

    Groups of slots walk together over the weights that they share.
    """
    program = tl.program_id(0)
    slot, j = tl.swizzle2d(program // row_tiles, program % row_tiles, slots, row_tiles, GROUP_SLOTS)
    expert = tl.load(tiles_ptr + slot).to(tl.int64)
    start = tl.load(tiles_ptr + slots + slot)
    count = tl.load(tiles_ptr + 2 * slots + slot)
    return slot, j, expert, start, count


@triton.jit
def scale_row_ptr(scale_ptr, expert, n, stride_se, stride_sn, W_BLOCKED: tl.constexpr):
    """Where the scales of the weight rows `n` of an expert begin."""
    row = n // _GROUP if W_BLOCKED else n
    return scale_ptr + expert * stride_se + row.to(tl.int64) * stride_sn


@triton.jit
def expert_product(
    weight_rows,  # pointers [BLOCK_N, 1]
    scale_rows,  # pointers [BLOCK_N, 1], read if FP8
    x_rows,  # pointers [1, BLOCK_T]
    x_scale_rows,  # pointers [1, BLOCK_T], read if FP8
    partials_ptr,  # [tiles, SPLITS, WIDE_T, BLOCK_N]
    arrivals_ptr,  # [tiles], zero before and after
    tile,
    in_features,  # [BLOCK_N, 1]: rows that there are to read
    count,  # of the pairs
    K,
    X_GROUPED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDE_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_T], all scales applied, and which pairs this program finishes: all in
    the one that arrives last, none in others."""
    IS_FP8: tl.constexpr = weight_rows.dtype.element_ty == tl.float8e4nv
    t = tl.arange(0, BLOCK_T)[None, :]
    in_rows = t < count
    total = _share_of_product(
        weight_rows, scale_rows, x_rows, x_scale_rows, in_features, in_rows, K,
        X_GROUPED, W_BLOCKED, SPLITS, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        total, is_last = _gathered(
            total, partials_ptr, arrivals_ptr, tile, in_rows, SPLITS, BLOCK_N, BLOCK_T, WIDE_T
        )
        in_rows = t < tl.where(is_last, count, 0)
    if IS_FP8 and not W_BLOCKED:
        total *= tl.load(scale_rows, mask=in_features, other=0.0)
    if IS_FP8 and not X_GROUPED:
        total *= tl.load(x_scale_rows, mask=in_rows, other=0.0)
    return total, in_rows


@triton.jit
def _share_of_product(
    weight_rows, scale_rows, x_rows, x_scale_rows, in_features, in_rows, K,
    X_GROUPED: tl.constexpr, W_BLOCKED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Over this program's share of K; scales of groups and blocks applied."""
    IS_FP8: tl.constexpr = weight_rows.dtype.element_ty == tl.float8e4nv
    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * share
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(
            weight_rows + k[None, :],
            mask=in_features & (k < K)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_rows + k[:, None], mask=(k < K)[:, None] & in_rows, other=0.0)
        if IS_FP8 and (X_GROUPED or W_BLOCKED):
            group = step * BLOCK_K // _GROUP
            product = tl.dot(weight, x)
            if W_BLOCKED:
                product *= tl.load(scale_rows + group, mask=in_features, other=0.0)
            if X_GROUPED:
                product *= tl.load(x_scale_rows + group, mask=in_rows, other=0.0)
            total += product
        elif IS_FP8:
            total = tl.dot(weight, x, total, max_num_imprecise_acc=BLOCK_K)
        else:
            total = tl.dot(weight, x, total, input_precision="ieee")
    return total


@triton.jit
def _gathered(
    total, partials_ptr, arrivals_ptr, tile, in_rows,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WIDE_T: tl.constexpr,
):  # fmt: skip
    """Totals of all splits, in their order, in the program that arrives last; zeros in others."""
    SIZE: tl.constexpr = BLOCK_N * WIDE_T
    tile_ptr = partials_ptr + tile.to(tl.int64) * (SPLITS * SIZE)
    cell = tl.arange(0, BLOCK_T)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    tl.store(tile_ptr + tl.program_id(1) * SIZE + cell, total, mask=in_rows)
    tl.debug_barrier()  # every thread has stored before one of them says so
    arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
    is_last = arrived == SPLITS - 1
    tl.store(arrivals_ptr + tile, 0, mask=is_last)
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for split in range(0, tl.where(is_last, SPLITS, 0)):
        at = tile_ptr + split * SIZE + cell
        total += tl.load(at, mask=in_rows, other=0.0, cache_modifier=".cg")
    return total, is_last
