"""The second product of `experts`: the routed sum of every row, on top of the shared output.

Letters: P pairs of a row and a choice, E experts, D hidden, F feed-forward width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.experts_frame import expert_product, scale_row_ptr, tile_of
from aerie.kernels.experts_launch import Call, scale_strides, split_scratch
from aerie.kernels.quantize import _GROUP, Quantized

SUM_COLUMNS = 1024  # of one program of the sum over choices


@triton.jit(do_not_specialize=["slots"])
def _experts_down_kernel(
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
    d_tiles = tl.cdiv(D, BLOCK_N)
    slot, j, expert, start, count = tile_of(tiles_ptr, slots, d_tiles, GROUP_SLOTS)
    for is_wide in tl.static_range(2 if WIDE_T > BLOCK_T else 1):  # pyright: ignore[reportGeneralTypeIssues]
        fewest, most = (BLOCK_T, WIDE_T) if is_wide else (0, BLOCK_T)
        if (count > fewest) & (count <= most):
            _down_tile(
                hidden_ptr, hidden_scale_ptr, pairs_ptr + start, weight_ptr, scale_ptr, shared_ptr,
                y_ptr, partials_ptr, arrivals_ptr, stride_st, stride_se, stride_sn,
                slot * d_tiles + j, j, expert, count, D, F, IS_FINAL, HAS_SHARED, W_BLOCKED, SPLITS,
                BLOCK_N, WIDE_T if is_wide else BLOCK_T, WIDE_T, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _down_tile(
    hidden_ptr, hidden_scale_ptr, pairs_ptr, weight_ptr, scale_ptr, shared_ptr, y_ptr, partials_ptr,
    arrivals_ptr, stride_st, stride_se, stride_sn, tile, j, expert, count, D, F,
    IS_FINAL: tl.constexpr, HAS_SHARED: tl.constexpr, W_BLOCKED: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WIDE_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Output columns of the pairs of one tile; pairs whose expert is elsewhere get a sum of 0."""
    IS_FP8: tl.constexpr = weight_ptr.dtype.element_ty == tl.float8e4nv
    n = (j * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    t = tl.arange(0, BLOCK_T)[None, :]
    pair = tl.load(pairs_ptr + t, mask=t < count, other=0).to(tl.int64)
    total, in_rows = expert_product(
        weight_ptr + (expert * D + n) * F,
        scale_row_ptr(scale_ptr, expert, n, stride_se, stride_sn, W_BLOCKED),
        hidden_ptr + pair * F,
        hidden_scale_ptr + pair * tl.cdiv(F, _GROUP),
        partials_ptr, arrivals_ptr, tile, n < tl.where(expert < 0, 0, D), count,
        tl.where(expert < 0, 0, F),
        IS_FP8, W_BLOCKED, SPLITS, BLOCK_N, BLOCK_T, WIDE_T, BLOCK_K,
    )  # fmt: skip
    inside = (n < D) & in_rows
    if IS_FINAL:
        total = total.to(y_ptr.dtype.element_ty).to(tl.float32)
        if HAS_SHARED:
            total += tl.load(shared_ptr + pair * stride_st + n, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + pair * D + n, total, mask=inside)


@triton.jit
def _experts_sum_kernel(
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


def launch_down(
    call: Call, hidden: Quantized, matrix: ExpertMatrix, x: Tensor, shared: Tensor | None
) -> Tensor:
    """The routed sum and the shared output."""
    (rows, choices), slots, config = call.ids.shape, call.tiles.shape[1], call.config.down
    _, depth, width = matrix.weight.shape
    y_TD = x.new_empty(x.shape)
    routed = y_TD if choices == 1 else x.new_empty((rows * choices, depth), dtype=torch.float32)
    tiles = triton.cdiv(depth, config.BLOCK_N)
    partials, arrivals = split_scratch(x, slots, tiles, config)
    addend = x if shared is None else shared
    _experts_down_kernel[(slots * tiles, config.SPLITS)](
        hidden.codes_TD,
        hidden.scales_TN,
        call.pairs,
        call.tiles,
        matrix.weight,
        matrix.weight if matrix.scale is None else matrix.scale,
        addend,
        routed,
        partials,
        arrivals,
        addend.stride(0),
        *scale_strides(matrix),
        slots,
        depth,
        width,
        IS_FINAL=choices == 1,
        HAS_SHARED=shared is not None,
        W_BLOCKED=matrix.is_blocked,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if choices > 1:
        _experts_sum_kernel[(rows, triton.cdiv(depth, SUM_COLUMNS))](
            routed, addend, y_TD, addend.stride(0), depth, A=choices,
            HAS_SHARED=shared is not None, BLOCK_D=SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
    return y_TD
