"""Weights as FP8 (e4m3) codes and float32 scales, per output channel or per block of 128 x 128.

    scale = max|w| / 448        over a row, or over a block;  1 where all of it is zero
    code  = e4m3(w / scale)

This is what llm-compressor's FP8_DYNAMIC and FP8_BLOCK schemes write (symmetric, largest value onto
e4m3's largest, no clipping search). Computed from the stored values in float32, so that quantising
while loading and `aerie convert` give the same bits.
"""

import torch
from torch import Tensor

LARGEST = 448.0
BLOCK = 128  # rows and columns of a block
ROWS = 256  # quantised at a time: what is wide stays small; a multiple of BLOCK


def quantize_weight(weight: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Fills `codes` (float8_e4m3fn) and `scale` (float32) from `weight` [.., N, K].

    `scale` is [.., N] or [.., N, 1] per channel, [.., ceil(N / 128), ceil(K / 128)] per block.
    """
    if scale.ndim < weight.ndim:
        scale = scale[..., None]
    rows = weight.shape[-2]
    is_blocked = tuple(scale.shape[-2:]) != (rows, 1)
    unit = BLOCK if is_blocked else 1
    for first in range(0, rows, ROWS):
        last = min(first + ROWS, rows)
        own = scale[..., first // unit : -(-last // unit), :]
        _quantize(weight[..., first:last, :].float(), codes[..., first:last, :], own, is_blocked)


def _quantize(wide: Tensor, codes: Tensor, scale: Tensor, is_blocked: bool) -> None:
    largest = _largest_of_blocks(wide) if is_blocked else wide.abs().amax(-1, keepdim=True)
    smallest = torch.finfo(torch.float32).tiny
    scale.copy_(torch.where(largest > 0, (largest / LARGEST).clamp(min=smallest), 1.0))
    spread = spread_blocks(scale, wide.shape) if is_blocked else scale
    codes.copy_((wide / spread).clamp_(-LARGEST, LARGEST))


def _largest_of_blocks(wide: Tensor) -> Tensor:
    rows, columns = wide.shape[-2:]
    padded = torch.nn.functional.pad(wide.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).amax((-1, -3))


def spread_blocks(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale of every element of a matrix (or several) of that shape."""
    rows = scale.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]
    return rows.repeat_interleave(BLOCK, -1)[..., : shape[-1]]
