"""Rows as FP8: e4m3 codes and the float32 scale of every row, or of every 128 columns of a row.

    scale = max|x| / 448                  over a row, or over a group of a row; at least 2^-100
    code  = e4m3(clamp(x * (1 / scale), -448, 448))          Micikevicius et al., arXiv 2209.05433

A static scale (ModelOpt's `input_scale`) takes the place of the first line. NaN does not count in a
maximum and keeps its own code; an infinity makes its own group zero or NaN, whose scale is then
infinite: what is multiplied with such a row is NaN, and no other row is touched.

`e4m3_codes` rounds with integers instead of a conversion: Triton's interpreter converts to FP8
wrongly, and this gives the bits of PyTorch's conversion there and on every GPU.

Letters: T rows, D width; N scales per row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable, widened

FP8 = torch.float8_e4m3fn
Codes = Literal["none", "row", "group"]  # whether rows become codes, and what shares a scale
GROUP = 128  # columns that share a scale, where rows have several
MAX_WIDTH = 65536  # one program holds a row in registers
LARGEST = 448.0
SMALLEST = 2.0**-100  # a maximum below counts as this: its reciprocal would be infinite
RECIPROCAL = 1.0 / LARGEST

_GROUP = tl.constexpr(GROUP)
_LARGEST, _SMALLEST, _RECIPROCAL = map(tl.constexpr, (LARGEST, SMALLEST, RECIPROCAL))


@dataclass(frozen=True)
class Quantized:
    """`codes_TD` (float8_e4m3fn) times `scales_TN` (float32): N is 1, or ceil(D / 128) groups."""

    codes_TD: Tensor
    scales_TN: Tensor


def quantize_ref(x_TD: Tensor, grouped: bool = False, scale: Tensor | None = None) -> Quantized:
    """The formula above in PyTorch, float32 inside."""
    rows, width = x_TD.shape
    wide_TNG = widened(x_TD).reshape(rows, 1, width)
    if grouped:
        padding = -width % GROUP
        wide_TNG = torch.nn.functional.pad(wide_TNG, (0, padding))
        wide_TNG = wide_TNG.view(rows, triton.cdiv(width, GROUP), GROUP)
    if scale is None:
        largest_TN = wide_TNG.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1)
        scales_TN = largest_TN.clamp(min=SMALLEST) * RECIPROCAL
    else:
        scales_TN = scale.to(wide_TNG.dtype).reshape(-1, 1).expand(rows, wide_TNG.shape[1])
    scaled = wide_TNG * scales_TN.reciprocal()[..., None]
    codes = scaled.clamp(-LARGEST, LARGEST).to(FP8).flatten(1)
    return Quantized(codes[:, :width].contiguous(), scales_TN.contiguous())


def dequantized(rows: Quantized) -> Tensor:
    """The values that the codes stand for, in the dtype of the scales."""
    scales, width = rows.scales_TN, rows.codes_TD.shape[1]
    if scales.shape[1] > 1:
        scales = scales.repeat_interleave(GROUP, dim=1)[:, :width]
    return rows.codes_TD.to(scales.dtype) * scales


@triton.jit
def e4m3_codes(x):
    """float32 as e4m3 (uint8), rounded to nearest even; clamped to 448, NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), _LARGEST)
    positive = magnitude.to(tl.int32, bitcast=True)
    normal = ((positive + 0x7FFFF + ((positive >> 20) & 1)) >> 20) - (120 << 3)
    # beside 2^14 float32 has steps of 2^-9, as e4m3 has below 2^-6: the addition rounds
    small = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def largest_magnitudes(x):
    """Of every row of `x`; NaN does not count."""
    return tl.max(tl.where(x == x, tl.abs(x), 0.0), axis=1)


@triton.jit
def scale_of(largest):
    return tl.maximum(largest, _SMALLEST) * _RECIPROCAL


@triton.jit
def store_quantized(
    x,  # [BLOCK_G, 128] float32, zero beyond the row
    codes_ptr,  # [D], of the row
    scales_ptr,  # [N], of the row
    scale,  # used if IS_STATIC
    D,
    GROUPED: tl.constexpr,
    IS_STATIC: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Codes and scales of one row that a program holds."""
    group = tl.arange(0, BLOCK_G)
    scales = tl.zeros([BLOCK_G], tl.float32)
    if IS_STATIC:
        scales += scale
    elif GROUPED:
        scales += scale_of(largest_magnitudes(x))
    else:
        scales += scale_of(tl.max(largest_magnitudes(x), axis=0))
    d = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    codes = e4m3_codes(x * tl.div_rn(1.0, scales)[:, None])
    tl.store(codes_ptr + d, codes, mask=d < D)
    groups = tl.cdiv(D, _GROUP) if GROUPED else 1
    tl.store(scales_ptr + group, scales, mask=group < groups)


@triton.jit
def _quantize_kernel(
    x_ptr,  # [T, D]
    scale_ptr,  # [1], read if IS_STATIC
    codes_ptr,  # [T, D]
    scales_ptr,  # [T, N]
    stride_xt,
    D,
    N,
    GROUPED: tl.constexpr,
    IS_STATIC: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_G)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    x = tl.load(x_ptr + t * stride_xt + d, mask=d < D, other=0.0).to(tl.float32)
    scale = 0.0
    if IS_STATIC:
        scale = tl.load(scale_ptr)
    store_quantized(x, codes_ptr + t * D, scales_ptr + t * N, scale, D, GROUPED, IS_STATIC, BLOCK_G)


@dataclass(frozen=True)
class LaunchConfig:
    """One row per program; `BLOCK_G` groups of 128 columns cover it."""

    BLOCK_G: int
    num_warps: int


def _launch_config(width: int) -> LaunchConfig:
    """Eight elements per thread, 1 to 16 warps. Chosen by shape; not yet measured on a GPU."""
    groups = triton.next_power_of_2(triton.cdiv(width, GROUP))
    return LaunchConfig(groups, num_warps=min(16, max(1, groups // 2)))


row_blocks = _launch_config  # for kernels that end in `store_quantized`


def scales_per_row(width: int, grouped: bool) -> int:
    return triton.cdiv(width, GROUP) if grouped else 1


def quantize_into(out: Quantized, x: Tensor, grouped: bool, scale: Tensor | None = None) -> None:
    """Launches the kernel on at least one row."""
    config = _launch_config(x.shape[1])
    _quantize_kernel[(len(x),)](
        x,
        out.scales_TN if scale is None else scale,
        out.codes_TD.view(torch.uint8),
        out.scales_TN,
        x.stride(0),
        x.shape[1],
        out.scales_TN.shape[1],
        GROUPED=grouped,
        IS_STATIC=scale is not None,
        BLOCK_G=config.BLOCK_G,
        num_warps=config.num_warps,
    )


@torch.library.custom_op("aerie::quantize", mutates_args=())
def _quantize_op(x: Tensor, grouped: bool, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    check_launchable(x)
    rows, width = x.shape
    scales = x.new_empty((rows, scales_per_row(width, grouped)), dtype=torch.float32)
    out = Quantized(x.new_empty(x.shape, dtype=FP8), scales)
    if rows > 0:
        quantize_into(out, x, grouped, scale)
    return out.codes_TD, out.scales_TN


@_quantize_op.register_fake
def _(x: Tensor, grouped: bool, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    scales = (x.shape[0], scales_per_row(x.shape[1], grouped))
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(scales, dtype=torch.float32)


def quantize(x_TD: Tensor, grouped: bool = False, scale: Tensor | None = None) -> Quantized:
    """FP8 codes of `x_TD` ([T, D], last dimension contiguous) with a scale per row.

    `grouped` gives a scale per 128 columns instead; `scale`, a float32 [1], is used for all as it
    is. Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    check_quantizable("x_TD", x_TD)
    if scale is not None and (scale.shape != (1,) or scale.dtype != torch.float32):
        raise ValueError(f"scale: must be float32 [1], got {scale.dtype} {tuple(scale.shape)}")
    return Quantized(*_quantize_op(x_TD, grouped, scale))


def check_quantizable(name: str, x: Tensor) -> None:
    """Raises ValueError unless `x` is [T, D] as one program can hold its rows."""
    check_dtype(name, x)
    if x.ndim != 2 or x.stride(-1) != 1 or not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"{name}: must be [T, D] with 1 to {MAX_WIDTH} contiguous columns, "
            f"got {tuple(x.shape)} strides {x.stride()}"
        )
