"""Draft logits: every logit of the draft head, with the final norm and the logit scale in one pass.

    x = RMSNorm(hidden)                              if `norm` is given
    logits = round(round(scale * x @ head^T) * logit_scale)       [T, U], in the dtype of hidden

For training and for sampled drafts; greedy drafts use `draft_vocab`, which never writes [T, U] and
shares the tile below. The K loop with its norm and its FP8 weights is that of `weight_stream`. A
NaN or inf stays in its row.

Letters: T rows, D hidden, U draft vocabulary.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable
from aerie.kernels.rms_norm import rms_norm_ref
from aerie.kernels.stream_launch import (
    LaunchConfig,
    check_rows,
    check_vector,
    check_weight,
    projected,
    scale_mode,
    scale_stride,
    stream_config,
    streamed,
)
from aerie.kernels.target import Target, target_of
from aerie.kernels.weight_stream import (
    block_row_ptr,
    reciprocal_rms,
    scaled_and_biased,
    stream_rows,
)

NO = tl.constexpr(False)


@dataclass(frozen=True)
class FinalNorm:
    """The RMSNorm in front of the head."""

    weight_D: Tensor
    eps: float


def draft_logits_ref(
    hidden_TD: Tensor,
    head_UD: Tensor,
    *,
    norm: FinalNorm | None = None,
    logit_scale: float = 1.0,
    scale_U: Tensor | None = None,
) -> Tensor:
    """The formulas above in PyTorch."""
    x_TD = hidden_TD if norm is None else rms_norm_ref(hidden_TD, norm.weight_D, norm.eps)
    logits_TU = projected(x_TD, head_UD, None, scale_U)
    return logits_TU if logit_scale == 1.0 else logits_TU * logit_scale


@triton.jit
def logits_tile(
    hidden_ptr,  # [T, D]
    head_ptr,  # [U, D]
    gain_ptr,  # [D], read if HAS_NORM
    scale_ptr,  # [U], [1] or [U / 128, D / 128], read if SCALE
    stride_ht,
    stride_wu,
    stride_su,
    t,  # [1, BLOCK_T], int64
    u,  # [BLOCK_U, 1]
    T,
    D,
    U,
    eps,
    logit_scale,
    HAS_NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits [BLOCK_U, BLOCK_T] in float32, rounded to the dtype of hidden as the formula says."""
    dtype = hidden_ptr.dtype.element_ty
    head_row_ptr, hidden_row_ptr = head_ptr + u.to(tl.int64) * stride_wu, hidden_ptr + t * stride_ht
    total, squares = tl.zeros([BLOCK_U, BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    total, squares = stream_rows(
        total, squares, head_row_ptr, block_row_ptr(scale_ptr, u, stride_su), hidden_row_ptr,
        hidden_row_ptr, gain_ptr, u < U, t < T, 0, tl.cdiv(D, BLOCK_D), D,
        NO, HAS_NORM, SCALE, BLOCK_U, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    if HAS_NORM:
        total *= reciprocal_rms(squares, D, eps)[None, :]
    total = scaled_and_biased(total, scale_ptr, scale_ptr, u, u < U, stride_su, SCALE, NO)
    return (total.to(dtype).to(tl.float32) * logit_scale).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _draft_logits_kernel(
    hidden_ptr,  # [T, D]
    head_ptr,  # [U, D]
    gain_ptr,  # [D], read if HAS_NORM
    scale_ptr,  # [U], [1] or [U / 128, D / 128], read if SCALE
    logits_ptr,  # [T, U]
    stride_ht,
    stride_wu,
    stride_su,
    T,
    D,
    U,
    eps,
    logit_scale,
    HAS_NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    u = tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    logits = logits_tile(
        hidden_ptr, head_ptr, gain_ptr, scale_ptr, stride_ht, stride_wu, stride_su,
        t, u, T, D, U, eps, logit_scale, HAS_NORM, SCALE, BLOCK_U, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    tl.store(logits_ptr + t * U + u, logits, mask=(t < T) & (u < U))


def head_config(
    target: Target, rows: int, vocabulary: int, itemsize: int, head_itemsize: int
) -> LaunchConfig:
    """The tile of `weight_stream`, half as deep at 64 columns, where the norm and an FP8 head or
    the keys of `draft_vocab` would not fit the registers beside a deeper one.

    Depth 0 asks the rule for no split: a head has tiles for every SM. Not yet measured on a GPU.
    """
    config = stream_config(target, rows, vocabulary, 0, 1, itemsize, head_itemsize)
    return config if config.BLOCK_T < 64 else replace(config, BLOCK_D=min(64, config.BLOCK_D))


def _launch_config(
    target: Target, rows: int, vocabulary: int, itemsize: int, head_itemsize: int
) -> LaunchConfig:
    return head_config(target, rows, vocabulary, itemsize, head_itemsize)


@torch.library.custom_op("aerie::draft_logits", mutates_args=())
def _draft_logits_op(
    hidden: Tensor,
    head: Tensor,
    gain: Tensor | None,
    eps: float,
    logit_scale: float,
    scale: Tensor | None,
) -> Tensor:
    check_launchable(hidden)
    (rows, width), vocabulary = hidden.shape, head.shape[0]
    logits_TU = hidden.new_empty(rows, vocabulary)
    if logits_TU.numel() == 0:
        return logits_TU
    head, head_itemsize = streamed(head, width), head.itemsize
    config = _launch_config(target_of(hidden), rows, vocabulary, hidden.itemsize, head_itemsize)
    _draft_logits_kernel[
        (triton.cdiv(rows, config.BLOCK_T), triton.cdiv(vocabulary, config.BLOCK_F))
    ](
        hidden,
        head,
        hidden if gain is None else gain,
        hidden if scale is None else scale,
        logits_TU,
        hidden.stride(0),
        head.stride(0),
        scale_stride(scale),
        rows,
        width,
        vocabulary,
        eps,
        logit_scale,
        HAS_NORM=gain is not None,
        SCALE=scale_mode(scale),
        BLOCK_U=config.BLOCK_F,
        BLOCK_T=config.BLOCK_T,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return logits_TU


@_draft_logits_op.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    gain: Tensor | None,
    eps: float,
    logit_scale: float,
    scale: Tensor | None,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], head.shape[0])


def check_head(
    hidden_TD: Tensor, head_UD: Tensor, norm: FinalNorm | None, scale_U: Tensor | None
) -> None:
    """Raises ValueError on a shape, dtype, device or layout the kernels would read wrongly."""
    check_rows("hidden_TD", hidden_TD)
    width, dtype = hidden_TD.shape[1], hidden_TD.dtype
    check_weight("head_UD", head_UD, width, hidden_TD, scale_U, "scale_U")
    if norm is not None:
        check_vector("norm.weight_D", norm.weight_D, width, hidden_TD, (dtype,))


def draft_logits(
    hidden_TD: Tensor,
    head_UD: Tensor,
    *,
    norm: FinalNorm | None = None,
    logit_scale: float = 1.0,
    scale_U: Tensor | None = None,
) -> Tensor:
    """All logits [T, U] of the draft head, in the dtype of `hidden_TD`.

    `scale_U` (float32, [U], [1] or [ceil(U / 128), ceil(D / 128)]) comes with an FP8 head and only
    then. Raises ValueError on a
    shape, dtype, device or layout the kernel would read wrongly.
    """
    check_head(hidden_TD, head_UD, norm, scale_U)
    gain, eps = (None, 0.0) if norm is None else (norm.weight_D, norm.eps)
    return _draft_logits_op(hidden_TD, head_UD, gain, eps, logit_scale, scale_U)
