"""Linear layer of FP8 rows and FP8 weights: products of codes, scales on their sums.

    y = (codes_x codes_W^T) * scale_x * scale_W + b

`linear` widens FP8 weights to the dtype of its rows: as few bytes, more exact, half the arithmetic
rate. Here both operands are e4m3, so the FP8 units multiply them: up to 64 rows in this kernel, on
swapped operands as in `experts` (`experts_frame.py`: tiles, promotion, split depth), with scales
per row and channel or per 128 columns and 128 x 128 block; more rows in torch's scaled product
where it takes the scales (`takes_scaled_mm`). The result is rounded once; torch's before a bias is
added, and again behind it. Models multiply codes in long prompts only (`quantises_rows`).

Letters: T rows, D input width, F output width; N scales per row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import DTYPES, check_launchable
from aerie.kernels.experts_frame import expert_product, scale_row_ptr
from aerie.kernels.experts_launch import ProductConfig, product_config, split_scratch
from aerie.kernels.quantize import FP8, Quantized, dequantized, scales_per_row
from aerie.kernels.stream_launch import check_vector, check_weight, scale_of_weights, scale_stride
from aerie.kernels.target import Target, target_of

FEW_ROWS = 64  # one tile: the weights are read once
STREAMED_ROWS = 128  # of a sequence: more than any round has, as a tree has at most 64


def quantises_rows(sequence_rows: int) -> bool:
    """Whether FP8 weights meet rows as codes (here) or as they are (`linear`, `gate_up`).

    `sequence_rows` are those of the step's longest sequence. Up to about 90 (4.3 TB/s against 790
    TFLOP/s) the weights' bytes bind, which both read alike, and rows that are not rounded are more
    exact. Beyond, arithmetic binds, and codes multiply at twice the rate.

    It goes by the rows of a sequence, not of the step: a decoded token, a tree under verification
    and a batch of either stay below, whatever the batch's size, so that a sequence is decoded in
    one arithmetic alone, among others, and with a draft. What lies above is a prompt, which all of
    these read alike. The price is a batch whose trees have many rows together: it streams.

    Where codes begin to be faster is not measured on a GPU: `make gpu` times `linear` with FP8
    weights (bench/kernels/linear.py) and this op with the quantisation of its rows
    (bench/kernels/scaled_linear.py) at 64, 256 and 1024 rows; bench/notes.md has the prediction.
    """
    return sequence_rows > STREAMED_ROWS


def scaled_linear_ref(
    rows: Quantized,
    weight_FD: Tensor,
    scale: Tensor,
    bias_F: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The formula above in PyTorch, in the precision of the scales."""
    wide = torch.promote_types(scale.dtype, rows.scales_TN.dtype)
    weight = weight_FD.to(wide) * scale_of_weights(scale, weight_FD)
    bias = None if bias_F is None else bias_F.to(wide)
    return functional.linear(dequantized(rows).to(wide), weight, bias).to(dtype)


@triton.jit(do_not_specialize=["T"])
def _scaled_linear_kernel(
    codes_ptr,  # [T, D]
    x_scale_ptr,  # [T, N]
    weight_ptr,  # [F, D]
    scale_ptr,  # [F], [1] or [F / 128, D / 128]
    bias_ptr,  # [F], read if HAS_BIAS
    y_ptr,  # [T, F]
    partials_ptr,  # as in `expert_product`
    arrivals_ptr,  # [tiles]
    stride_wf,
    stride_sf,
    T,
    D,
    F,
    N,
    BLOCKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile = tl.program_id(0)
    f_tiles = tl.cdiv(F, BLOCK_N)
    first = tile // f_tiles * BLOCK_T
    f = (tile % f_tiles * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    t = (first + tl.arange(0, BLOCK_T))[None, :].to(tl.int64)
    total, in_rows = expert_product(
        weight_ptr + f.to(tl.int64) * stride_wf,
        scale_row_ptr(scale_ptr, 0, f, 0, stride_sf, BLOCKED),
        codes_ptr + t * D,
        x_scale_ptr + t * N,
        partials_ptr, arrivals_ptr, tile, f < F, tl.minimum(T - first, BLOCK_T), D,
        BLOCKED, BLOCKED, SPLITS, BLOCK_N, BLOCK_T, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * F + f, total, mask=(f < F) & in_rows)


@dataclass(frozen=True)
class LaunchConfig:
    """Whether torch's product serves, and else the tiles of the kernel."""

    scaled_mm: bool
    tiles: ProductConfig


def takes_scaled_mm(
    target: Target, rows: int, features: int, depth: int, is_blocked: bool, dtype: torch.dtype
) -> bool:
    """Whether `torch._scaled_mm` multiplies: where arithmetic binds, and it takes the arguments.

    It wants scales per row and channel, multiples of 16 and bfloat16 results, and on AMD's MI300
    another FP8 (fnuz). That it is faster is not measured on a GPU; what is public of prompts says
    so (torchao#2784: 1009 TFLOP/s against 399 of a Triton kernel with block scales).
    """
    aligned = features % 16 == 0 and depth % 16 == 0
    takes_codes = not is_blocked and dtype == torch.bfloat16 and target.unit != "mfma"
    return rows > FEW_ROWS and aligned and takes_codes


def _launch_config(
    target: Target, rows: int, features: int, depth: int, is_blocked: bool, dtype: torch.dtype
) -> LaunchConfig:
    """The tiles of one expert that all rows have chosen. Not yet measured on a GPU."""
    tiles = product_config(target, rows, 1, features, depth, dtype.itemsize, True, False)
    return LaunchConfig(takes_scaled_mm(target, rows, features, depth, is_blocked, dtype), tiles)


@torch.library.custom_op("aerie::scaled_linear", mutates_args=())
def _scaled_linear_op(
    codes: Tensor,
    code_scales: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    (rows, depth), features, is_blocked = codes.shape, len(weight), scale.ndim == 2
    y_TF = code_scales.new_empty((rows, features), dtype=dtype)
    if rows == 0:
        return y_TF
    config = _launch_config(target_of(codes), rows, features, depth, is_blocked, dtype)
    if config.scaled_mm:
        return _scaled_mm(codes, code_scales, weight, scale, bias, dtype)
    check_launchable(y_TF)
    tiles, f_tiles = config.tiles, triton.cdiv(features, config.tiles.BLOCK_N)
    t_tiles = triton.cdiv(rows, tiles.WIDE_T)
    partials, arrivals = split_scratch(code_scales, t_tiles, f_tiles, tiles)
    _scaled_linear_kernel[(t_tiles * f_tiles, tiles.SPLITS)](
        codes,
        code_scales,
        weight,
        scale,
        scale if bias is None else bias,
        y_TF,
        partials,
        arrivals,
        weight.stride(0),
        scale_stride(scale),
        rows,
        depth,
        features,
        code_scales.shape[1],
        BLOCKED=is_blocked,
        HAS_BIAS=bias is not None,
        SPLITS=tiles.SPLITS,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_T=tiles.WIDE_T,
        BLOCK_K=tiles.BLOCK_K,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return y_TF


def _scaled_mm(
    codes: Tensor,
    code_scales: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    per_channel = scale.expand(len(weight)).contiguous().view(1, -1)
    y = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        codes, weight.t(), code_scales, per_channel, out_dtype=dtype, use_fast_accum=False
    )
    return y if bias is None else (y + bias).to(dtype)


@_scaled_linear_op.register_fake
def _(codes, code_scales, weight, scale, bias, dtype):
    return code_scales.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


def scaled_linear(
    rows: Quantized,
    weight_FD: Tensor,
    scale: Tensor,
    bias_F: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The formula above; returns [T, F] of `dtype`.

    `weight_FD` is float8_e4m3fn with `scale` as in `linear`: float32 [F], [1], or one per block of
    128 x 128; with blocks `rows` has a scale per 128 columns, else per row. Raises ValueError on a
    shape, dtype, device or layout that would be read wrongly.
    """
    codes, depth = rows.codes_TD, rows.codes_TD.shape[-1]
    if codes.ndim != 2 or codes.dtype != FP8 or not codes.is_contiguous():
        raise ValueError(
            f"rows.codes_TD: must be a contiguous {FP8} [T, D], got {codes.dtype} "
            f"{tuple(codes.shape)} strides {codes.stride()}"
        )
    check_weight("weight_FD", weight_FD, depth, codes, scale, "scale")
    check_vector("bias_F", bias_F, len(weight_FD), codes)
    wanted, given = (len(codes), scales_per_row(depth, scale.ndim == 2)), rows.scales_TN
    if tuple(given.shape) != wanted or given.dtype != torch.float32 or not given.is_contiguous():
        raise ValueError(
            f"rows.scales_TN: must be a contiguous float32 {wanted}, one per "
            f"{'row' if wanted[1] == 1 else '128 columns as the weight has blocks'}, "
            f"got {given.dtype} {tuple(given.shape)}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype: must be float32, float16 or bfloat16, got {dtype}")
    return _scaled_linear_op(codes, given, weight_FD, scale, bias_F, dtype)
