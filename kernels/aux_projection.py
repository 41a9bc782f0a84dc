"""EAGLE-3's feature fusion: concatenate the tapped hidden states of the target and project them.

    y = concat(n_0(tap_0 + r_0), ..., n_{I-1}(tap_{I-1} + r_{I-1})) @ W^T + b

EAGLE-3 (arXiv 2503.01840, section 3.1) fuses a low, a middle and a high layer this way. A tap may
still be split in a hidden state and a residual r; n is nothing, one RMSNorm per tap (`fc_norm`), or
one RMSNorm over the whole vector (`norm_before_fc`). The concatenation, the sums and the normed
rows are never materialised: gains are multiplied in on load, the reciprocal RMS on the accumulator.

The K loop and the split of the depth are those of `weight_stream`; a split never straddles taps, so
the RMS of a tap belongs to its split. The last program to arrive adds the splits: a second kernel
would be simpler, but its launch costs some percent of a product that takes tens of microseconds.

Letters: T rows, I taps, D width of a tap, F output width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor, nn

from aerie.kernels.aux_projection_kernel import MAX_TAPS, _aux_projection_kernel
from aerie.kernels.backend import ResolvedBackend, check_launchable, pick
from aerie.kernels.module import Module
from aerie.kernels.rms_norm import rms_norm_ref
from aerie.kernels.stream_launch import (
    LaunchConfig,
    check_segments,
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
from aerie.kernels.weight_stream import JOINT_NORM, NO_NORM, SEGMENT_NORM


@dataclass(frozen=True)
class TapNorm:
    """One RMSNorm per tap, `weights[i]` is [D] (`fc_norm`)."""

    weights: tuple[Tensor, ...]
    eps: float


@dataclass(frozen=True)
class JointNorm:
    """One RMSNorm over the whole [I * D] vector (`norm_before_fc`)."""

    weight_I: Tensor
    eps: float


Norm = TapNorm | JointNorm


def aux_projection_ref(
    taps: Sequence[Tensor],
    weight_FI: Tensor,
    bias: Tensor | None = None,
    *,
    residuals: Sequence[Tensor] | None = None,
    norm: Norm | None = None,
    scale_F: Tensor | None = None,
) -> Tensor:
    """The formula above in PyTorch, with the concatenation; rounds where Hugging Face does."""
    if residuals is not None:
        taps = [tap + residual for tap, residual in zip(taps, residuals, strict=True)]
    if isinstance(norm, TapNorm):
        pairs = zip(taps, norm.weights, strict=True)
        taps = [rms_norm_ref(tap, weight, norm.eps) for tap, weight in pairs]
    rows = torch.cat(list(taps), dim=-1)
    if isinstance(norm, JointNorm):
        rows = rms_norm_ref(rows, norm.weight_I, norm.eps)
    return projected(rows, weight_FI, bias, scale_F)


def _launch_config(
    target: Target,
    rows: int,
    features: int,
    width: int,
    num_taps: int,
    itemsize: int,
    weight_itemsize: int,
    through_registers: bool,
) -> LaunchConfig:
    """The shared rule with a tap as a segment: three taps of 5120 to 5120 are 240 programs."""
    return stream_config(
        target, rows, features, width, num_taps, itemsize, weight_itemsize, through_registers
    )


@torch.library.custom_op("aerie::aux_projection", mutates_args=())
def _aux_projection_op(
    taps: Sequence[Tensor],
    residuals: Sequence[Tensor],
    gains: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm: int,
    eps: float,
) -> Tensor:
    x = taps[0]
    check_launchable(x)
    (rows, width), features = x.shape, weight.shape[0]
    out_TF = x.new_empty((rows, features))
    through_registers = bool(residuals or gains)
    config = _launch_config(
        target_of(x), rows, features, width, len(taps), x.itemsize, weight.itemsize,
        through_registers,
    )  # fmt: skip
    weight = streamed(weight, width)
    splits = config.PARTS * len(taps) if config.SPLIT else 1
    grid = (triton.cdiv(rows, config.BLOCK_T), triton.cdiv(features, config.BLOCK_F), splits)
    if out_TF.numel() == 0:
        return out_TF
    partials, arrivals = split_scratch(x, config, grid)
    _aux_projection_kernel[grid](
        *_eight(taps, x),
        *_eight(residuals, x),
        *_eight(gains, x),
        weight,
        weight if scale is None else scale,
        weight if bias is None else bias,
        out_TF,
        partials,
        arrivals,
        x.stride(0),
        residuals[0].stride(0) if residuals else 0,
        weight.stride(0),
        scale_stride(scale),
        rows,
        width,
        features,
        eps,
        NUM_TAPS=len(taps),
        NORM=norm,
        HAS_RESIDUAL=len(residuals) > 0,
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
    return out_TF


def _eight(tensors: Sequence[Tensor], filler: Tensor) -> list[Tensor]:
    return [*tensors, *[filler] * (MAX_TAPS - len(tensors))]


@_aux_projection_op.register_fake
def _(
    taps: Sequence[Tensor],
    residuals: Sequence[Tensor],
    gains: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm: int,
    eps: float,
) -> Tensor:
    return taps[0].new_empty((taps[0].shape[0], weight.shape[0]))


def aux_projection(
    taps: Sequence[Tensor],
    weight_FI: Tensor,
    bias: Tensor | None = None,
    *,
    residuals: Sequence[Tensor] | None = None,
    norm: Norm | None = None,
    scale_F: Tensor | None = None,
) -> Tensor:
    """Projection of the concatenated `taps` (each [T, D]); `weight_FI` is [F, I*D]; returns [T, F].

    `residuals`, one per tap, are added first. An FP8 weight (float8_e4m3fn) comes with `scale_F`,
    float32 [F], [1] or, for blocks of 128 x 128, [ceil(F / 128), I * D / 128]. Taps that share a
    row stride, as slices of one capture buffer do, are read in place; others are copied. Raises
    ValueError on a shape, dtype, device or layout the kernel would read wrongly.
    """
    if not 1 <= len(taps) <= MAX_TAPS:
        raise ValueError(f"taps: must be 1 to {MAX_TAPS} tensors, got {len(taps)}")
    check_segments("taps", taps, taps[0])
    first = taps[0]
    if residuals is not None:
        if len(residuals) != len(taps):
            raise ValueError(f"residuals: must be {len(taps)} as the taps, got {len(residuals)}")
        check_segments("residuals", residuals, first)
    columns = len(taps) * first.shape[1]
    check_weight("weight_FI", weight_FI, columns, first, scale_F, "scale_F", len(taps))
    check_vector("bias", bias, weight_FI.shape[0], first)
    gains = _checked_gains(norm, taps)
    mode = JOINT_NORM if isinstance(norm, JointNorm) else SEGMENT_NORM if norm else NO_NORM
    return _aux_projection_op(
        _with_one_stride(taps), _with_one_stride(residuals or []), gains, weight_FI, bias, scale_F,
        mode.value, norm.eps if norm else 0.0,
    )  # fmt: skip


def _with_one_stride(tensors: Sequence[Tensor]) -> list[Tensor]:
    strides = {tensor.stride(0) for tensor in tensors}
    return list(tensors) if len(strides) <= 1 else [tensor.contiguous() for tensor in tensors]


def _checked_gains(norm: Norm | None, taps: Sequence[Tensor]) -> list[Tensor]:
    width = taps[0].shape[1]
    if isinstance(norm, JointNorm):
        check_vector("norm.weight_I", norm.weight_I, len(taps) * width, taps[0])
        return list(norm.weight_I.split(width))
    if norm is None:
        return []
    if len(norm.weights) != len(taps):
        raise ValueError(f"norm.weights: must be {len(taps)} as the taps, got {len(norm.weights)}")
    for i, weight in enumerate(norm.weights):
        check_vector(f"norm.weights[{i}]", weight, width, taps[0])
    return list(norm.weights)


class AuxProjection(Module):
    """`aux_projection` with its weight ([width_out, num_taps * width_in]) and optional bias."""

    def __init__(
        self, width_in: int, num_taps: int, width_out: int, bias: bool, backend: ResolvedBackend
    ) -> None:
        super().__init__()
        weight = torch.empty(width_out, num_taps * width_in)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width_out), requires_grad=False) if bias else None
        self._project = pick(backend, aux_projection, aux_projection_ref)

    def forward(self, taps: Sequence[Tensor], norm: Norm | None = None) -> Tensor:
        return self._project(taps, self.weight, self.bias, norm=norm)
