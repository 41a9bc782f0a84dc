"""The first product of `experts`: gate and up of every pair, and SwiGLU of them.

Letters: P pairs of a row and a choice, E experts, D hidden, F feed-forward width, N scales per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.experts_frame import expert_product, scale_row_ptr, tile_of
from aerie.kernels.experts_launch import Call, scale_strides, split_scratch
from aerie.kernels.quantize import (
    _GROUP,
    FP8,
    GROUP,
    Quantized,
    e4m3_codes,
    largest_magnitudes,
    scale_of,
)


@triton.jit(do_not_specialize=["slots"])
def _experts_gate_up_kernel(
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
    f_tiles = tl.cdiv(F, BLOCK_N // 2)
    slot, j, expert, start, count = tile_of(tiles_ptr, slots, f_tiles, GROUP_SLOTS)
    for is_wide in tl.static_range(2 if WIDE_T > BLOCK_T else 1):  # pyright: ignore[reportGeneralTypeIssues]
        fewest, most = (BLOCK_T, WIDE_T) if is_wide else (0, BLOCK_T)
        if (expert >= 0) & (count > fewest) & (count <= most):
            _gate_up_tile(
                x_ptr, x_scale_ptr, scores_ptr, pairs_ptr + start, weight_ptr, scale_ptr,
                inner_scale_ptr + expert * stride_ie, hidden_ptr, hidden_scale_ptr, partials_ptr,
                arrivals_ptr, stride_xt, stride_xs, stride_se, stride_sn, slot * f_tiles + j, j,
                expert, count, D, F, A, X_PER_PAIR, X_GROUPED, W_BLOCKED, INNER_IS_STATIC, SPLITS,
                BLOCK_N, WIDE_T if is_wide else BLOCK_T, WIDE_T, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _gate_up_tile(
    x_ptr, x_scale_ptr, scores_ptr, pairs_ptr, weight_ptr, scale_ptr, inner_scale_ptr, hidden_ptr,
    hidden_scale_ptr, partials_ptr, arrivals_ptr, stride_xt, stride_xs, stride_se, stride_sn,
    tile, j, expert, count, D, F,
    A: tl.constexpr, X_PER_PAIR: tl.constexpr, X_GROUPED: tl.constexpr, W_BLOCKED: tl.constexpr,
    INNER_IS_STATIC: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr, WIDE_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows 0 to HALF of gate and of up, alternating in the tile, and SwiGLU of their products."""
    HALF: tl.constexpr = BLOCK_N // 2
    IS_FP8: tl.constexpr = weight_ptr.dtype.element_ty == tl.float8e4nv
    tile_row = tl.arange(0, BLOCK_N)[:, None]
    column = j * HALF + tile_row // 2
    n = tl.where(tile_row % 2 == 0, column, column + F)
    t = tl.arange(0, BLOCK_T)[None, :]
    pair = tl.load(pairs_ptr + t, mask=t < count, other=0).to(tl.int64)
    row = pair if X_PER_PAIR else pair // A
    total, in_rows = expert_product(
        weight_ptr + (expert * (2 * F) + n) * D,
        scale_row_ptr(scale_ptr, expert, n, stride_se, stride_sn, W_BLOCKED),
        x_ptr + row * stride_xt,
        x_scale_ptr + row * stride_xs,
        partials_ptr, arrivals_ptr, tile, column < F, count, D,
        X_GROUPED, W_BLOCKED, SPLITS, BLOCK_N, BLOCK_T, WIDE_T, BLOCK_K,
    )  # fmt: skip
    if not X_PER_PAIR:
        total *= tl.load(scores_ptr + pair, mask=in_rows, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.permute(tl.reshape(total, [HALF, 2, BLOCK_T]), (0, 2, 1)))
    f = (j * HALF + tl.arange(0, HALF))[:, None]
    inside = (f < F) & in_rows
    if IS_FP8:
        scale_at = hidden_scale_ptr + pair * tl.cdiv(F, _GROUP) + j
        codes = _inner_codes(
            gate, up, inner_scale_ptr, scale_at, inside, in_rows, INNER_IS_STATIC, HALF, BLOCK_T
        )
        tl.store(hidden_ptr + pair * F + f, codes, mask=inside)
    else:
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        gate = gate.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        tl.store(hidden_ptr + pair * F + f, silu * up.to(dtype).to(tl.float32), mask=inside)


@triton.jit
def _inner_codes(
    gate, up, static_ptr, scale_at, inside, in_rows, INNER_IS_STATIC: tl.constexpr,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """FP8 codes [HALF, BLOCK_T] of silu(gate) * up, whose HALF columns share a scale per pair."""
    tl.static_assert(HALF == _GROUP, "the columns of a tile share a scale")
    inner = tl.trans(gate / (1.0 + tl.exp(-gate)) * up)
    if INNER_IS_STATIC:
        scale = tl.zeros([BLOCK_T], tl.float32) + tl.load(static_ptr)
    else:
        scale = scale_of(largest_magnitudes(tl.where(tl.trans(inside), inner, 0.0)))
    tl.store(scale_at, scale[None, :], mask=in_rows)
    return tl.trans(e4m3_codes(inner * tl.div_rn(1.0, scale)[:, None]))


def launch_gate_up(
    call: Call, x: Tensor, quantized: Quantized | None, matrix: ExpertMatrix, down: ExpertMatrix
) -> Quantized:
    """The rows behind SwiGLU, as codes with scales where the weights are FP8."""
    pairs, slots, config = call.pairs.numel(), call.tiles.shape[1], call.config.gate_up
    (_, depth, width), static = down.weight.shape, down.input_scale
    hidden = x.new_empty((pairs, width), dtype=x.dtype if quantized is None else FP8)
    groups = triton.cdiv(width, GROUP)
    hidden_scales = x if quantized is None else x.new_empty((pairs, groups), dtype=torch.float32)
    tiles = triton.cdiv(width, config.BLOCK_N // 2)
    partials, arrivals = split_scratch(x, slots, tiles, config)
    rows = x if quantized is None else quantized.codes_TD
    scales = x if quantized is None else quantized.scales_TN
    _experts_gate_up_kernel[(slots * tiles, config.SPLITS)](
        rows,
        scales,
        call.scores,
        call.pairs,
        call.tiles,
        matrix.weight,
        matrix.weight if matrix.scale is None else matrix.scale,
        x if static is None else static,
        hidden if quantized is None else hidden.view(torch.uint8),
        hidden_scales,
        partials,
        arrivals,
        rows.stride(0),
        scales.stride(0),
        *scale_strides(matrix),
        0 if static is None else int(static.numel() > 1),
        slots,
        depth,
        width,
        A=call.ids.shape[1],
        X_PER_PAIR=matrix.input_scale is not None,
        X_GROUPED=matrix.is_blocked,
        W_BLOCKED=matrix.is_blocked,
        INNER_IS_STATIC=static is not None,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return Quantized(hidden, hidden_scales)
