"""EAGLE-3's attention input: queries, keys and values of the next token's embedding and the hidden.

    y = concat(norm_e(table[ids]), norm_h(hidden)) @ W^T + b

with W the rows of q, k and v packed, two RMSNorms, and the embedding first (EAGLE-3, arXiv
2503.01840, section 3.1). Embedding rows, norms and the concatenation are never materialised: the
kernel runs `weight_stream` over two segments, multiplies the gains in on load and each reciprocal
RMS on its segment's accumulator.

An id outside [0, V) cannot be reported without waiting for the GPU: as in `embedding` its row
is not read and the output row becomes NaN, while the reference raises IndexError.

Letters: T rows, V rows of the table, D width of each half, F packed output width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable
from aerie.kernels.embedding import embedding_ref
from aerie.kernels.rms_norm import rms_norm_ref
from aerie.kernels.stream_launch import (
    LaunchConfig,
    check_device,
    check_rows,
    check_vector,
    check_weight,
    projected,
    scale_mode,
    scale_stride,
    split_scratch,
    stream_config,
    streamed,
)
from aerie.kernels.target import Target, target_of
from aerie.kernels.weight_stream import (
    OFF,
    ON,
    SCALE_BLOCK,
    SEGMENT_NORM,
    TWO,
    block_row_ptr,
    gather_splits,
    reciprocal_rms,
    scaled_and_biased,
    steps_of_part,
    stored_columns,
    stream_rows,
)


def qkv_projection_ref(
    ids_T: Tensor,
    table_VD: Tensor,
    hidden_TD: Tensor,
    embed_weight_D: Tensor,
    hidden_weight_D: Tensor,
    eps: float,
    weight_F2D: Tensor,
    scale_F: Tensor | None = None,
    bias_F: Tensor | None = None,
) -> Tensor:
    """The formula above in PyTorch; raises IndexError on an id outside [0, V)."""
    halves_T2D = torch.stack((embedding_ref(ids_T, table_VD), hidden_TD), dim=1)
    gains_2D = torch.stack((embed_weight_D, hidden_weight_D))
    normed_T2D = rms_norm_ref(halves_T2D, gains_2D, eps)
    return projected(normed_T2D.flatten(1), weight_F2D, bias_F, scale_F)


@triton.jit(do_not_specialize=["T", "V"])
def _qkv_projection_kernel(
    ids_ptr,  # [T]
    table_ptr,  # [V, D]
    hidden_ptr,  # [T, D]
    embed_gain_ptr,  # [D]
    hidden_gain_ptr,  # [D]
    weight_ptr,  # [F, 2 * D]
    scale_ptr,  # [F], [1] or [F / 128, columns / 128], read if SCALE
    bias_ptr,  # [F], read if HAS_BIAS
    y_ptr,  # [T, F]
    partials_ptr,  # as in `gather_splits`
    arrivals_ptr,  # [tiles]
    stride_vd,
    stride_ht,
    stride_wf,
    stride_sf,
    T,
    V,
    D,
    F,
    eps,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :].to(tl.int64)
    f = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    in_features, in_rows = f < F, t < T
    ids = tl.load(ids_ptr + t, mask=in_rows, other=-1)
    known = (ids >= 0) & (ids < V)
    ids = tl.where(known, ids, 0)  # some row of the table, in place of a mask on every load
    weight_row_ptr = weight_ptr + f.to(tl.int64) * stride_wf
    first_segment = tl.program_id(2) // PARTS
    last_segment = first_segment + 1 if SPLIT else 2
    first, last = steps_of_part(tl.program_id(2) % PARTS, D, PARTS, BLOCK_D)
    total = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    scale_row_ptr = block_row_ptr(scale_ptr, f, stride_sf)
    columns = stored_columns(weight_ptr, D)
    for segment in range(first_segment, last_segment):
        x_ptr = tl.where(segment == 0, table_ptr, hidden_ptr)
        # strides are selected, not offsets: the compiler then still sees that rows are aligned
        stride = tl.where(segment == 0, stride_vd, stride_ht).to(tl.int64)
        x_row_ptr = x_ptr + tl.where(segment == 0, ids, t) * stride
        gain_ptr = tl.where(segment == 0, embed_gain_ptr, hidden_gain_ptr)
        half_total, half_squares = stream_rows(
            tl.zeros_like(total), tl.zeros_like(squares), weight_row_ptr + segment * columns,
            scale_row_ptr + segment * (D // SCALE_BLOCK), x_row_ptr, x_row_ptr, gain_ptr,
            in_features, in_rows, first, last, D, OFF, ON, SCALE, BLOCK_F, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        if not SPLIT:
            half_total *= reciprocal_rms(half_squares, D, eps)[None, :]
        total += half_total
        squares += half_squares
    if SPLIT:
        total, squares, is_last = gather_splits(
            total, squares, partials_ptr, arrivals_ptr, D, eps, SEGMENT_NORM, TWO, PARTS,
            BLOCK_F, BLOCK_T,
        )  # fmt: skip
        in_rows = t < tl.where(is_last, T, 0)
    total = scaled_and_biased(
        total, scale_ptr, bias_ptr, f, in_features, stride_sf, SCALE, HAS_BIAS
    )
    y = tl.where(known, total, float("nan"))
    tl.store(y_ptr + t * F + f, y, mask=in_features & in_rows)


def _launch_config(
    target: Target, rows: int, features: int, width: int, itemsize: int, weight_itemsize: int
) -> LaunchConfig:
    """The shared rule with two segments: 2 x 5120 to 7168 are 224 programs. Not yet measured."""
    return stream_config(target, rows, features, width, 2, itemsize, weight_itemsize, True)


@torch.library.custom_op("aerie::qkv_projection", mutates_args=())
def _qkv_projection_op(
    ids: Tensor,
    table: Tensor,
    hidden: Tensor,
    embed_gain: Tensor,
    hidden_gain: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    check_launchable(hidden)
    (rows, width), features = hidden.shape, weight.shape[0]
    y_TF = hidden.new_empty(rows, features)
    config = _launch_config(
        target_of(hidden), rows, features, width, hidden.itemsize, weight.itemsize
    )
    weight = streamed(weight, width)
    splits = 2 * config.PARTS if config.SPLIT else 1
    grid = (triton.cdiv(rows, config.BLOCK_T), triton.cdiv(features, config.BLOCK_F), splits)
    if y_TF.numel() == 0:
        return y_TF
    partials, arrivals = split_scratch(hidden, config, grid)
    _qkv_projection_kernel[grid](
        ids,
        table,
        hidden,
        embed_gain,
        hidden_gain,
        weight,
        weight if scale is None else scale,
        weight if bias is None else bias,
        y_TF,
        partials,
        arrivals,
        table.stride(0),
        hidden.stride(0),
        weight.stride(0),
        scale_stride(scale),
        rows,
        table.shape[0],
        width,
        features,
        eps,
        SCALE=scale_mode(scale),
        HAS_BIAS=bias is not None,
        PARTS=config.PARTS,
        SPLIT=config.SPLIT,
        BLOCK_F=config.BLOCK_F,
        BLOCK_T=config.BLOCK_T,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y_TF


@_qkv_projection_op.register_fake
def _(
    ids: Tensor,
    table: Tensor,
    hidden: Tensor,
    embed_gain: Tensor,
    hidden_gain: Tensor,
    eps: float,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


def qkv_projection(
    ids_T: Tensor,
    table_VD: Tensor,
    hidden_TD: Tensor,
    embed_weight_D: Tensor,
    hidden_weight_D: Tensor,
    eps: float,
    weight_F2D: Tensor,
    scale_F: Tensor | None = None,
    bias_F: Tensor | None = None,
) -> Tensor:
    """Packed q|k|v rows [T, F] of `concat(norm(table_VD[ids_T]), norm(hidden_TD))`.

    `weight_F2D` is [F, 2 * D], embedding columns first; FP8 (float8_e4m3fn) comes with `scale_F`,
    float32 [F], [1] or, for blocks of 128 x 128, [ceil(F / 128), 2 * D / 128]. An id outside
    [0, V) gives a row of NaN. Raises ValueError on a shape, dtype, device or layout the kernel
    would read wrongly.
    """
    check_rows("hidden_TD", hidden_TD)
    rows, width = hidden_TD.shape
    if ids_T.shape != (rows,) or ids_T.dtype != torch.int64 or not ids_T.is_contiguous():
        raise ValueError(
            f"ids_T: must be a contiguous int64 [{rows}], got {ids_T.dtype} {tuple(ids_T.shape)}"
        )
    check_device("ids_T", ids_T, hidden_TD)
    check_rows("table_VD", table_VD)
    if table_VD.shape[0] == 0 or table_VD.shape[1] != width or table_VD.dtype != hidden_TD.dtype:
        raise ValueError(
            f"table_VD: must be [V, {width}] {hidden_TD.dtype} as hidden_TD, V > 0, "
            f"got {tuple(table_VD.shape)} {table_VD.dtype}"
        )
    check_device("table_VD", table_VD, hidden_TD)
    check_vector("embed_weight_D", embed_weight_D, width, hidden_TD)
    check_vector("hidden_weight_D", hidden_weight_D, width, hidden_TD)
    check_weight("weight_F2D", weight_F2D, 2 * width, hidden_TD, scale_F, "scale_F", 2)
    check_vector("bias_F", bias_F, weight_F2D.shape[0], hidden_TD)
    return _qkv_projection_op(
        ids_T, table_VD, hidden_TD, embed_weight_D, hidden_weight_D, eps, weight_F2D, scale_F,
        bias_F,
    )  # fmt: skip
