"""RMSNorm over the last dimension, alone or fused with the residual add in front of it.

    s = x + residual                                     (rounded to the input dtype)
    y = weight * round(s / sqrt(mean(s^2) + eps))        Zhang & Sennrich, arXiv 1910.07467, eq. 4

As in Hugging Face's Llama 4 the statistics and the division are float32, the normalised value is
rounded to the input dtype, and only then multiplied by the weight. The fused form also returns
`s`: at the input of layer I it is the un-normed residual stream, EAGLE-3's tap of that layer.

Letters: T rows, D width.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from aerie.kernels.backend import (
    ResolvedBackend,
    check_dtype,
    check_launchable,
    constant,
    pick,
    rounded,
    widened,
)
from aerie.kernels.module import Module

MAX_WIDTH = 65536  # one program holds a row in registers


@dataclass(frozen=True)
class NormedResidual:
    """`normed_TD` feeds the next sub-layer, `residual_TD` (un-normed) goes on along the stream."""

    normed_TD: Tensor
    residual_TD: Tensor


def rms_norm_ref(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The formula above in PyTorch, float32 inside."""
    return normalise_ref(x_TD, eps).mul_(weight_D)


def normalise_ref(x_TD: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight: x sqrt(D) / hypot(|x|, sqrt(D eps)), the formula in fewer calls.

    PyTorch wraps a Python number of a formula in a new tensor, which takes as long as arithmetic
    on a row; hence the constants.
    """
    wide = widened(x_TD)
    own = _norm_constants(wide.shape[-1], eps, wide.dtype, wide.device)
    length_T1 = torch.hypot(torch.linalg.vector_norm(wide, 2, -1, True), own.root_of_eps)
    normed_TD = torch.addcdiv(own.zero, wide, length_T1, value=own.root_of_width)
    return rounded(normed_TD, x_TD.dtype)


@dataclass(frozen=True)
class _NormConstants:
    zero: Tensor
    root_of_eps: Tensor  # sqrt(D eps)
    root_of_width: float


@lru_cache(maxsize=256)
def _norm_constants(
    width: int, eps: float, dtype: torch.dtype, device: torch.device
) -> _NormConstants:
    like = torch.empty((), dtype=dtype, device=device)
    root_of_eps = constant(math.sqrt(width * eps), like)
    return _NormConstants(constant(0.0, like), root_of_eps, math.sqrt(width))


def add_rms_norm_ref(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float):
    """Residual add, then `rms_norm_ref` of the sum."""
    sum_TD = x_TD + residual_TD
    return NormedResidual(rms_norm_ref(sum_TD, weight_D, eps), sum_TD)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D], read if HAS_RESIDUAL
    weight_ptr,  # [D]
    normed_ptr,  # [T, D]
    sum_ptr,  # [T, D], written if HAS_RESIDUAL
    stride_xt,
    stride_rt,
    D,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_row = d < D
    x = tl.load(x_ptr + t * stride_xt + d, mask=in_row, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + t * stride_rt + d, mask=in_row, other=0.0)
        total = (x + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + t * D + d, total, mask=in_row)
        x = total.to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / D
    normed = (x / tl.sqrt(mean_square + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    tl.store(normed_ptr + t * D + d, normed * weight, mask=in_row)


@dataclass(frozen=True)
class LaunchConfig:
    """One row per program; `BLOCK_D` covers the whole row."""

    BLOCK_D: int
    num_warps: int


def _launch_config(width: int) -> LaunchConfig:
    """Eight elements per thread, 1 to 16 warps. Chosen by shape; not yet measured on a GPU."""
    block = triton.next_power_of_2(width)
    return LaunchConfig(BLOCK_D=block, num_warps=min(16, max(1, block // 256)))


def _launch(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float):
    check_launchable(x_TD)
    rows, width = x_TD.shape
    normed_TD = x_TD.new_empty(x_TD.shape)
    sum_TD = x_TD.new_empty(x_TD.shape) if residual_TD is not None else normed_TD
    residual = x_TD if residual_TD is None else residual_TD
    config = _launch_config(width)
    if rows > 0:
        _rms_norm_kernel[(rows,)](
            x_TD,
            residual,
            weight_D,
            normed_TD,
            sum_TD,
            x_TD.stride(0),
            residual.stride(0),
            width,
            eps,
            HAS_RESIDUAL=residual_TD is not None,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
        )
    return normed_TD, sum_TD


@torch.library.custom_op("aerie::rms_norm", mutates_args=())
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, eps)[0]


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("aerie::add_rms_norm", mutates_args=())
def _add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch(x, residual, weight, eps)


@_add_rms_norm_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of every row of `x_TD` ([T, D], last dimension contiguous); same shape and dtype.

    Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    check_norm(x_TD, weight_D)
    return _rms_norm_op(x_TD, weight_D, eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> NormedResidual:
    """`rms_norm(x_TD + residual_TD)` and the sum itself, in one pass. Errors as `rms_norm`."""
    check_norm(x_TD, weight_D)
    if residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype:
        raise ValueError(
            f"residual_TD: must match x_TD {tuple(x_TD.shape)} {x_TD.dtype}, "
            f"got {tuple(residual_TD.shape)} {residual_TD.dtype}"
        )
    return NormedResidual(*_add_rms_norm_op(x_TD, residual_TD.contiguous(), weight_D, eps))


def check_norm(x_TD: Tensor, weight_D: Tensor) -> None:
    if x_TD.ndim != 2 or x_TD.stride(-1) != 1:
        raise ValueError(
            f"x_TD: must be [T, D] with a contiguous last dimension, "
            f"got shape {tuple(x_TD.shape)} strides {x_TD.stride()}"
        )
    check_dtype("x_TD", x_TD)
    if not 1 <= x_TD.shape[1] <= MAX_WIDTH:
        raise ValueError(
            f"x_TD: width must be at least 1 and at most {MAX_WIDTH}, got {x_TD.shape[1]}"
        )
    if weight_D.shape != x_TD.shape[1:] or not weight_D.is_contiguous():
        raise ValueError(
            f"weight_D: must be a contiguous [{x_TD.shape[1]}], got {tuple(weight_D.shape)}"
        )


class RMSNorm(Module):
    """RMSNorm with a weight of `width`, named as in Hugging Face checkpoints (`weight`)."""

    def __init__(self, width: int, eps: float, backend: ResolvedBackend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)
        self.eps = eps
        self._norm = pick(backend, rms_norm, rms_norm_ref)
        self._add_norm = pick(backend, add_rms_norm, add_rms_norm_ref)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._norm(x_TD, self._parameters["weight"], self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor | None) -> NormedResidual:
        """Norm of `x + residual` and the sum; with no residual yet, the sum is `x` itself."""
        if residual_TD is None:
            return NormedResidual(self(x_TD), x_TD)
        return self._add_norm(self.whole(x_TD), residual_TD, self._parameters["weight"], self.eps)

    def whole(self, x_TD: Tensor) -> Tensor:
        """The output of the block in front, which one rank of several has a summand of."""
        return x_TD
