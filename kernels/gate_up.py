"""Gate and up projections with SwiGLU in their epilogue.

    y = silu(x Wg^T) * (x Wu^T)                                 Shazeer 2020, arXiv 2002.05202

Wg and Wu are packed, gate rows first. One program computes the same output columns of both: its
weight tile alternates gate and up rows, so one stream (`weight_stream`) and one accumulator serve,
and the [T, 2F] intermediate is never written. Gate, up and silu are each rounded to the dtype, as
`linear` and `swiglu` round them.

Letters: T rows, D input width, F feed-forward width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable
from aerie.kernels.stream_launch import (
    LaunchConfig,
    check_rows,
    check_weight,
    projected,
    scale_mode,
    scale_stride,
    split_scratch,
    stream_config,
    streamed,
)
from aerie.kernels.swiglu import swiglu_halves_ref
from aerie.kernels.target import Target, target_of
from aerie.kernels.weight_stream import (
    NO_NORM,
    OFF,
    ONE,
    block_row_ptr,
    gather_splits,
    scaled_and_biased,
    steps_of_part,
    stream_rows,
)


def gate_up_ref(x_TD: Tensor, weight_F2D: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """The formula above in PyTorch."""
    return swiglu_halves_ref(projected(x_TD, weight_F2D, None, scale))


@triton.jit(do_not_specialize=["T"])
def _gate_up_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [2 * F, D]
    scale_ptr,  # [2 * F], [1] or [2 * F / 128, D / 128], read if SCALE
    y_ptr,  # [T, F]
    partials_ptr,  # as in `gather_splits`
    arrivals_ptr,  # [tiles]
    stride_xt,
    stride_wf,
    stride_sf,
    T,
    D,
    F,
    SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_F // 2
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :].to(tl.int64)
    tile_row = tl.arange(0, BLOCK_F)[:, None]
    column = tl.program_id(1) * HALF + tile_row // 2
    weight_row = column + (tile_row % 2).to(tl.int64) * F  # gate, up, gate, up, ...
    in_features, in_rows = column < F, t < T
    x_row_ptr = x_ptr + t * stride_xt
    weight_row_ptr = weight_ptr + weight_row * stride_wf
    first, last = steps_of_part(tl.program_id(2), D, PARTS, BLOCK_D)
    total, squares = tl.zeros([BLOCK_F, BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    total, squares = stream_rows(
        total, squares, weight_row_ptr, block_row_ptr(scale_ptr, weight_row, stride_sf),
        x_row_ptr, x_row_ptr, x_ptr, in_features, in_rows, first, last, D,
        OFF, OFF, SCALE, BLOCK_F, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    if PARTS > 1:
        total, squares, is_last = gather_splits(
            total,
            squares,
            partials_ptr,
            arrivals_ptr,
            D,
            0.0,
            NO_NORM,
            ONE,
            PARTS,
            BLOCK_F,
            BLOCK_T,
        )
        in_rows = t < tl.where(is_last, T, 0)
    total = scaled_and_biased(
        total, scale_ptr, scale_ptr, weight_row, in_features, stride_sf, SCALE, OFF
    )
    pairs = tl.permute(tl.reshape(total, [HALF, 2, BLOCK_T]), (0, 2, 1))
    gate, up = tl.split(pairs)
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    f = (tl.program_id(1) * HALF + tl.arange(0, HALF))[:, None]
    y = silu * up.to(dtype).to(tl.float32)
    tl.store(y_ptr + t * F + f, y, mask=(f < F) & in_rows)


def _launch_config(
    target: Target, rows: int, width: int, depth: int, itemsize: int, weight_itemsize: int
) -> LaunchConfig:
    """The shared rule for 2F weight rows: 8192 columns are 256 programs. Not yet measured."""
    return stream_config(target, rows, 2 * width, depth, 1, itemsize, weight_itemsize)


@torch.library.custom_op("aerie::gate_up", mutates_args=())
def _gate_up_op(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    check_launchable(x)
    (rows, depth), width = x.shape, weight.shape[0] // 2
    y_TF = x.new_empty(rows, width)
    config = _launch_config(target_of(x), rows, width, depth, x.itemsize, weight.itemsize)
    weight = streamed(weight, depth)
    tiles = triton.cdiv(width, config.BLOCK_F // 2)
    grid = (triton.cdiv(rows, config.BLOCK_T), tiles, config.PARTS)
    if y_TF.numel() > 0:
        partials, arrivals = split_scratch(x, config, grid)
        _gate_up_kernel[grid](
            x,
            weight,
            weight if scale is None else scale,
            y_TF,
            partials,
            arrivals,
            x.stride(0),
            weight.stride(0),
            scale_stride(scale),
            rows,
            depth,
            width,
            SCALE=scale_mode(scale),
            PARTS=config.PARTS,
            BLOCK_F=config.BLOCK_F,
            BLOCK_T=config.BLOCK_T,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y_TF


@_gate_up_op.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2)


def gate_up(x_TD: Tensor, weight_F2D: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """`silu(x_TD @ Wg^T) * (x_TD @ Wu^T)`; returns [T, F] in the dtype of `x_TD`.

    `weight_F2D` is [2 * F, D], gate rows first; FP8 (float8_e4m3fn) comes with `scale`, float32
    [2 * F], [1] or, for blocks of 128 x 128, [ceil(2 * F / 128), ceil(D / 128)]. Raises ValueError
    on a shape, dtype, device or layout the kernel would read wrongly.
    """
    check_rows("x_TD", x_TD)
    check_weight("weight_F2D", weight_F2D, x_TD.shape[1], x_TD, scale, "scale")
    if weight_F2D.shape[0] % 2:
        raise ValueError(f"weight_F2D: must have 2 * F rows, got {tuple(weight_F2D.shape)}")
    return _gate_up_op(x_TD, weight_F2D, scale)
