"""The two grouped products of `fp8_experts` on swapped operands.

A program has one tile of one expert (`expert_order.py`): a tile of weight rows is the left operand,
the pairs of that expert are its columns. A Hopper GPU multiplies 64 rows of the left operand at a
time, and FP8 codes on its FP8 units only from there; few tokens are too few rows, but not too few
columns. In a step of at most 64 pairs all pairs of an expert are one tile, so its weights are read
once: most tiles have at most `BLOCK_T` pairs, those with more take the branch for `WIDE_T`.

Hopper's FP8 units keep about 14 bits of a sum. So every step of 64 or 128 columns is summed apart
and added in float32, where the scale of a group or block is applied in the same instruction.

Letters: P pairs of a row and a choice, E experts, D hidden, F feed-forward width, N scales per row.
"""

import triton
import triton.language as tl

from aerie.kernels.quantize import (
    _GROUP,
    e4m3_codes,
    largest_magnitudes,
    scale_of,
    store_quantized,
)


@triton.jit(do_not_specialize=["first_expert"])
def _scaled_rows_kernel(
    x_ptr,  # [T, D]
    ids_ptr,  # [T, A]
    scores_ptr,  # [T, A]
    input_scale_ptr,  # [E] or [1]
    codes_ptr,  # [P, D]
    scales_ptr,  # [P, 1]
    stride_xt,
    stride_ie,
    D,
    E,
    first_expert,
    A: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Codes of x * score, one row per pair, under the static scale of its expert."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64) - first_expert
    expert = tl.where((expert >= 0) & (expert < E), expert, 0)
    score = tl.load(scores_ptr + pair).to(tl.float32)
    d = tl.arange(0, BLOCK_G)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    x = tl.load(x_ptr + pair // A * stride_xt + d, mask=d < D, other=0.0).to(tl.float32)
    x = (x * score).to(x_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.load(input_scale_ptr + expert * stride_ie)
    store_quantized(x, codes_ptr + pair * D, scales_ptr + pair, scale, D, False, True, BLOCK_G)


@triton.jit(do_not_specialize=["slots"])
def _fp8_experts_gate_up_kernel(
    x_ptr,  # [T, D], or [P, D] if X_PER_PAIR
    x_scale_ptr,  # [T or P, N], read if FP8
    scores_ptr,  # [P]
    pairs_ptr,  # [P]
    tiles_ptr,  # [3, slots]
    weight_ptr,  # [E, 2F, D]
    scale_ptr,  # [E, 1 or 2F or blocks, 1 or blocks], read if FP8
    inner_scale_ptr,  # [E] or [1], read if INNER_IS_STATIC
    hidden_ptr,  # [P, F]
    hidden_scale_ptr,  # [P, ceil(F / 128)], written if FP8
    partials_ptr,  # [slots * f_tiles, SPLITS, WIDE_T, BLOCK_N]
    arrivals_ptr,  # [slots * f_tiles], zero before and after
    stride_xt,
    stride_xs,
    stride_se,
    stride_sn,
    stride_ie,
    slots,
    D,
    F,
    A: tl.constexpr,
    X_PER_PAIR: tl.constexpr,
    X_GROUPED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    INNER_IS_STATIC: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDE_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_N // 2
    slot, j = _tile_of(tl.program_id(0), slots, tl.cdiv(F, HALF), GROUP_SLOTS)
    expert = tl.load(tiles_ptr + slot).to(tl.int64)
    start = tl.load(tiles_ptr + slots + slot)
    count = tl.load(tiles_ptr + 2 * slots + slot)
    is_wide = count > BLOCK_T
    if (count > 0) & (expert >= 0) & (count <= BLOCK_T):
        _gate_up_tile(
            x_ptr, x_scale_ptr, scores_ptr, pairs_ptr + start, weight_ptr, scale_ptr,
            inner_scale_ptr, hidden_ptr, hidden_scale_ptr, partials_ptr, arrivals_ptr,
            stride_xt, stride_xs, stride_se, stride_sn, stride_ie, slot, j, expert, count, D, F,
            A, X_PER_PAIR, X_GROUPED, W_BLOCKED, INNER_IS_STATIC, SPLITS, BLOCK_N, BLOCK_T,
            WIDE_T, BLOCK_K,
        )  # fmt: skip
    if WIDE_T > BLOCK_T:  # noqa: SIM102 - known to the compiler, unlike the count
        if is_wide & (expert >= 0):
            _gate_up_tile(
                x_ptr, x_scale_ptr, scores_ptr, pairs_ptr + start, weight_ptr, scale_ptr,
                inner_scale_ptr, hidden_ptr, hidden_scale_ptr, partials_ptr, arrivals_ptr,
                stride_xt, stride_xs, stride_se, stride_sn, stride_ie, slot, j, expert, count, D, F,
                A, X_PER_PAIR, X_GROUPED, W_BLOCKED, INNER_IS_STATIC, SPLITS, BLOCK_N, WIDE_T,
                WIDE_T, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _tile_of(program, slots, tiles, GROUP_SLOTS: tl.constexpr):
    """Slot and weight tile: groups of slots walk together over the weights that they share."""
    return tl.swizzle2d(program // tiles, program % tiles, slots, tiles, GROUP_SLOTS)


@triton.jit
def _gate_up_tile(
    x_ptr, x_scale_ptr, scores_ptr, pairs_ptr, weight_ptr, scale_ptr, inner_scale_ptr, hidden_ptr,
    hidden_scale_ptr, partials_ptr, arrivals_ptr, stride_xt, stride_xs, stride_se, stride_sn,
    stride_ie, slot, j, expert, count, D, F,
    A: tl.constexpr, X_PER_PAIR: tl.constexpr, X_GROUPED: tl.constexpr, W_BLOCKED: tl.constexpr,
    INNER_IS_STATIC: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, WIDE_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows 0 to HALF of gate and of up, alternating in the tile, and SwiGLU of their products."""
    HALF: tl.constexpr = BLOCK_N // 2
    IS_FP8: tl.constexpr = weight_ptr.dtype.element_ty == tl.float8e4nv
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    tl.static_assert(not IS_FP8 or HALF == _GROUP, "the columns of a tile share a scale")
    tile_row = tl.arange(0, BLOCK_N)[:, None]
    column = j * HALF + tile_row // 2
    n = tl.where(tile_row % 2 == 0, column, column + F)
    in_features = column < F
    t = tl.arange(0, BLOCK_T)[None, :]
    in_rows = t < count
    pair = tl.load(pairs_ptr + t, mask=in_rows, other=0).to(tl.int64)
    row = pair if X_PER_PAIR else pair // A
    total = _product(
        weight_ptr + (expert * (2 * F) + n) * D,
        scale_ptr + expert * stride_se + (n // _GROUP if W_BLOCKED else n).to(tl.int64) * stride_sn,
        x_ptr + row * stride_xt,
        x_scale_ptr + row * stride_xs,
        in_features, in_rows, D, X_GROUPED, W_BLOCKED, SPLITS, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        tile = slot * tl.cdiv(F, HALF) + j
        total, is_last = _gathered(
            total, partials_ptr, arrivals_ptr, tile, in_rows, SPLITS, BLOCK_N, BLOCK_T, WIDE_T
        )
        in_rows = t < tl.where(is_last, count, 0)
    if IS_FP8 and not W_BLOCKED:
        total *= tl.load(
            scale_ptr + expert * stride_se + n.to(tl.int64) * stride_sn, in_features, 0.0
        )
    if IS_FP8 and not X_GROUPED:
        total *= tl.load(x_scale_ptr + row * stride_xs, mask=in_rows, other=0.0)
    if not X_PER_PAIR:
        total *= tl.load(scores_ptr + pair, mask=in_rows, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.permute(tl.reshape(total, [HALF, 2, BLOCK_T]), (0, 2, 1)))
    f = (j * HALF + tl.arange(0, HALF))[:, None]
    inside = (f < F) & in_rows
    if IS_FP8:
        inner = tl.trans(gate / (1.0 + tl.exp(-gate)) * up)
        if INNER_IS_STATIC:
            scale = tl.zeros([BLOCK_T], tl.float32) + tl.load(inner_scale_ptr + expert * stride_ie)
        else:
            scale = scale_of(largest_magnitudes(tl.where(tl.trans(inside), inner, 0.0)))
        codes = tl.trans(e4m3_codes(inner * tl.div_rn(1.0, scale)[:, None]))
        scale_at = hidden_scale_ptr + pair * tl.cdiv(F, _GROUP) + j
        tl.store(scale_at, scale[None, :], mask=in_rows)
        tl.store(hidden_ptr + pair * F + f, codes, mask=inside)
    else:
        gate = gate.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(hidden_ptr + pair * F + f, silu * up.to(dtype).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["slots"])
def _fp8_experts_down_kernel(
    hidden_ptr,  # [P, F]
    hidden_scale_ptr,  # [P, ceil(F / 128)], read if FP8
    pairs_ptr,  # [P]
    tiles_ptr,  # [3, slots]
    weight_ptr,  # [E, D, F]
    scale_ptr,  # [E, 1 or D or blocks, 1 or blocks], read if FP8
    shared_ptr,  # [T, D], read if HAS_SHARED
    y_ptr,  # [T, D], or float32 [P, D] if not IS_FINAL
    partials_ptr,  # [slots * d_tiles, SPLITS, WIDE_T, BLOCK_N]
    arrivals_ptr,  # [slots * d_tiles], zero before and after
    stride_st,
    stride_se,
    stride_sn,
    slots,
    D,
    F,
    IS_FINAL: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDE_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    slot, j = _tile_of(tl.program_id(0), slots, tl.cdiv(D, BLOCK_N), GROUP_SLOTS)
    expert = tl.load(tiles_ptr + slot).to(tl.int64)
    start = tl.load(tiles_ptr + slots + slot)
    count = tl.load(tiles_ptr + 2 * slots + slot)
    is_wide = count > BLOCK_T
    if (count > 0) & (count <= BLOCK_T):
        _down_tile(
            hidden_ptr, hidden_scale_ptr, pairs_ptr + start, weight_ptr, scale_ptr, shared_ptr,
            y_ptr, partials_ptr, arrivals_ptr, stride_st, stride_se, stride_sn, slot, j, expert,
            count, D, F, IS_FINAL, HAS_SHARED, W_BLOCKED, SPLITS, BLOCK_N, BLOCK_T, WIDE_T,
            BLOCK_K,
        )  # fmt: skip
    if WIDE_T > BLOCK_T:  # noqa: SIM102 - known to the compiler, unlike the count
        if is_wide:
            _down_tile(
                hidden_ptr, hidden_scale_ptr, pairs_ptr + start, weight_ptr, scale_ptr, shared_ptr,
                y_ptr, partials_ptr, arrivals_ptr, stride_st, stride_se, stride_sn, slot, j, expert,
                count, D, F, IS_FINAL, HAS_SHARED, W_BLOCKED, SPLITS, BLOCK_N, WIDE_T, WIDE_T,
                BLOCK_K,
            )  # fmt: skip


@triton.jit
def _down_tile(
    hidden_ptr, hidden_scale_ptr, pairs_ptr, weight_ptr, scale_ptr, shared_ptr, y_ptr, partials_ptr,
    arrivals_ptr, stride_st, stride_se, stride_sn, slot, j, expert, count, D, F,
    IS_FINAL: tl.constexpr, HAS_SHARED: tl.constexpr, W_BLOCKED: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WIDE_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Output columns of the pairs of one tile; pairs whose expert is elsewhere get a sum of 0."""
    IS_FP8: tl.constexpr = weight_ptr.dtype.element_ty == tl.float8e4nv
    n = (j * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    t = tl.arange(0, BLOCK_T)[None, :]
    in_features, in_rows = n < D, t < count
    pair = tl.load(pairs_ptr + t, mask=in_rows, other=0).to(tl.int64)
    depth = tl.where(expert < 0, 0, F)
    scale_row_ptr = (
        scale_ptr + expert * stride_se + (n // _GROUP if W_BLOCKED else n).to(tl.int64) * stride_sn
    )
    total = _product(
        weight_ptr + (expert * D + n) * F,
        scale_row_ptr,
        hidden_ptr + pair * F,
        hidden_scale_ptr + pair * tl.cdiv(F, _GROUP),
        in_features, in_rows, depth, IS_FP8, W_BLOCKED, SPLITS, BLOCK_N, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if SPLITS > 1:
        tile = slot * tl.cdiv(D, BLOCK_N) + j
        total, is_last = _gathered(
            total, partials_ptr, arrivals_ptr, tile, in_rows, SPLITS, BLOCK_N, BLOCK_T, WIDE_T
        )
        in_rows = t < tl.where(is_last, count, 0)
    if IS_FP8 and not W_BLOCKED:
        total *= tl.load(scale_row_ptr, mask=n < tl.where(expert < 0, 0, D), other=0.0)
    inside = in_features & in_rows
    if IS_FINAL:
        total = total.to(y_ptr.dtype.element_ty).to(tl.float32)
        if HAS_SHARED:
            total += tl.load(shared_ptr + pair * stride_st + n, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + pair * D + n, total, mask=inside)


@triton.jit
def _product(
    weight_row_ptr,  # [BLOCK_N, 1]
    scale_row_ptr,  # [BLOCK_N, 1], read if W_BLOCKED
    x_row_ptr,  # [1, BLOCK_T]
    x_scale_row_ptr,  # [1, BLOCK_T], read if X_GROUPED
    in_features,
    in_rows,
    K,
    X_GROUPED: tl.constexpr,
    W_BLOCKED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_T] over this program's share of K, group and block scales applied."""
    IS_FP8: tl.constexpr = weight_row_ptr.dtype.element_ty == tl.float8e4nv
    steps = tl.cdiv(K, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * share
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        weight = tl.load(
            weight_row_ptr + k[None, :],
            mask=in_features & (k < K)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_row_ptr + k[:, None], mask=(k < K)[:, None] & in_rows, other=0.0)
        if IS_FP8 and (X_GROUPED or W_BLOCKED):
            group = step * BLOCK_K // _GROUP
            product = tl.dot(weight, x)
            if W_BLOCKED:
                product *= tl.load(scale_row_ptr + group, mask=in_features, other=0.0)
            if X_GROUPED:
                product *= tl.load(x_scale_row_ptr + group, mask=in_rows, other=0.0)
            total += product
        elif IS_FP8:
            total = tl.dot(weight, x, total, max_num_imprecise_acc=BLOCK_K)
        else:
            total = tl.dot(weight, x, total, input_precision="ieee")
    return total


@triton.jit
def _gathered(
    total,
    partials_ptr,
    arrivals_ptr,
    tile,
    in_rows,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    WIDE_T: tl.constexpr,
):
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


@triton.jit
def _fp8_experts_sum_kernel(
    routed_ptr,  # float32 [T, A, D]
    shared_ptr,  # [T, D], read if HAS_SHARED
    y_ptr,  # [T, D]
    stride_st,
    D,
    A: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < D
    total = tl.zeros([BLOCK_D], tl.float32)
    for a in range(A):
        total += tl.load(routed_ptr + (t * A + a) * D + d, mask=in_row, other=0.0)
    total = total.to(y_ptr.dtype.element_ty).to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared_ptr + t * stride_st + d, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * D + d, total, mask=in_row)
