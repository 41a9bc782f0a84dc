"""The rotation of every position of a step: cosines and sines of RoPE's angles.

    angle[t, j] = float32(position[t]) * f[j],   f[j] = theta^(-2j / K)     Su et al. 2021, arXiv
    2104.09864, section 3.4; computed once per step and shared by all layers.

llama3 scaling changes f by its wavelength w = 2 pi / f and the original context C:

    w < C / high: f      w > C / low: f / factor      between: (1 - s) f / factor + s f,
    s = (C / w - low) / (high - low)

Scout Instruct ships low == high: the band between is empty and s would be 0 / 0, so there s = 0.
Positions, angles, cosines and sines are float32, as in Hugging Face.

Letters: T rows, J rotary pairs (half the head dimension K).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable


@dataclass(frozen=True)
class Llama3Scaling:
    """The llama3 scaling of a checkpoint; fields named as in its config."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every angle, float32."""

    cos_TJ: Tensor
    sin_TJ: Tensor

    @cached_property
    def turns_T1J(self) -> Tensor:
        """cos + i sin, for the reference: rotating a pair is one complex product."""
        return torch.complex(self.cos_TJ, self.sin_TJ)[:, None]

    def split(self, rows: int) -> "list[Rotation]":
        """Those of steps of `rows` rows each, which follow each other here."""
        parts = (slice(first, first + rows) for first in range(0, len(self.cos_TJ), rows))
        return [Rotation(self.cos_TJ[part], self.sin_TJ[part]) for part in parts]


def inverse_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> Tensor:
    """The [J] frequencies f, scaled if asked. Raises ValueError on an odd head dimension."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: must be even and positive, got {head_dim}")
    frequency_J = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    return frequency_J if scaling is None else _scale(frequency_J, scaling)


def _scale(frequency_J: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength_J = 2 * math.pi / frequency_J
    is_slow_J = wavelength_J > context / low
    is_fast_J = wavelength_J < context / high
    smooth_J = (context / wavelength_J - low) / (high - low) if high != low else 0.0
    blend_J = (1 - smooth_J) * frequency_J / scaling.factor + smooth_J * frequency_J
    scaled_J = torch.where(is_slow_J, frequency_J / scaling.factor, frequency_J)
    return torch.where(is_slow_J | is_fast_J, scaled_J, blend_J)


def rotation_ref(positions_T: Tensor, inv_freq_J: Tensor) -> Rotation:
    """The formula above in PyTorch."""
    angle_TJ = positions_T[:, None].float() * inv_freq_J
    return Rotation(angle_TJ.cos(), angle_TJ.sin())


@triton.jit(do_not_specialize=["T"])
def _rotation_kernel(
    positions_ptr,  # [T]
    inv_freq_ptr,  # [J]
    cos_ptr,  # [T, J]
    sin_ptr,  # [T, J]
    T,
    J,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_J)
    position = tl.load(positions_ptr + t, mask=t < T, other=0).to(tl.float32)
    inv_freq = tl.load(inv_freq_ptr + j, mask=j < J, other=0.0)
    angle = position[:, None] * inv_freq[None, :]
    offset = t[:, None] * J + j[None, :]
    in_tile = (t < T)[:, None] & (j < J)[None, :]
    tl.store(cos_ptr + offset, tl.cos(angle), mask=in_tile)
    tl.store(sin_ptr + offset, tl.sin(angle), mask=in_tile)


@dataclass(frozen=True)
class LaunchConfig:
    """One program does all pairs of `BLOCK_T` rows."""

    BLOCK_T: int
    BLOCK_J: int
    num_warps: int


def _launch_config(pairs: int) -> LaunchConfig:
    """About 512 angles per program. Chosen by shape; not yet measured on a GPU."""
    block = triton.next_power_of_2(pairs)
    return LaunchConfig(BLOCK_T=max(1, 512 // block), BLOCK_J=block, num_warps=4)


@torch.library.custom_op("aerie::rotation", mutates_args=())
def _rotation_op(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    check_launchable(inv_freq)
    rows, pairs = positions.shape[0], inv_freq.shape[0]
    cos_TJ, sin_TJ = inv_freq.new_empty(rows, pairs), inv_freq.new_empty(rows, pairs)
    config = _launch_config(pairs)
    if rows > 0:
        _rotation_kernel[(triton.cdiv(rows, config.BLOCK_T),)](
            positions,
            inv_freq,
            cos_TJ,
            sin_TJ,
            rows,
            pairs,
            BLOCK_T=config.BLOCK_T,
            BLOCK_J=config.BLOCK_J,
            num_warps=config.num_warps,
        )
    return cos_TJ, sin_TJ


@_rotation_op.register_fake
def _(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    shape = (positions.shape[0], inv_freq.shape[0])
    return inv_freq.new_empty(shape), inv_freq.new_empty(shape)


def rotation(positions_T: Tensor, inv_freq_J: Tensor) -> Rotation:
    """The rotation of `positions_T` (int64, absolute) at the frequencies `inv_freq_J` (float32).

    Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    for name, x, dtype in (
        ("positions_T", positions_T, torch.int64),
        ("inv_freq_J", inv_freq_J, torch.float32),
    ):
        if x.ndim != 1 or x.dtype != dtype or not x.is_contiguous():
            raise ValueError(
                f"{name}: must be a contiguous one-dimensional {dtype}, "
                f"got {x.dtype} {tuple(x.shape)}"
            )
    return Rotation(*_rotation_op(positions_T, inv_freq_J))
