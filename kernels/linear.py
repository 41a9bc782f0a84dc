"""Linear layer for few rows: the weights are read once, the rows ride along.

    y = x W^T + b

The weight tile is the left operand of every product and the rows are its columns (swap-AB): a
Hopper GPU multiplies 64 rows of the left operand at a time, which a step of 1 to 16 tokens would
leave mostly empty. Accumulation and the bias are float32; the result is rounded once.

Letters: T rows, D input width, F output width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend, check_launchable, pick

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def linear_ref(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The formula above in PyTorch."""
    return F.linear(x_TD, weight_FD, bias_F)


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [F, D]
    bias_ptr,  # [F], read if HAS_BIAS
    y_ptr,  # [T, F]
    stride_xt,
    stride_wf,
    T,
    D,
    F,
    HAS_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_features, in_rows = f < F, t < T
    weight_row_ptr = weight_ptr + f.to(tl.int64)[:, None] * stride_wf
    x_row_ptr = x_ptr + t.to(tl.int64)[None, :] * stride_xt
    total = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_depth = d < D
        weight_mask = in_features[:, None] & in_depth[None, :]
        x_mask = in_depth[:, None] & in_rows[None, :]
        weight = tl.load(weight_row_ptr + d[None, :], mask=weight_mask, other=0.0)
        x = tl.load(x_row_ptr + d[:, None], mask=x_mask, other=0.0)  # [BLOCK_D, BLOCK_T]
        total = tl.dot(weight, x, total, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + f, mask=in_features, other=0.0).to(tl.float32)
        total += bias[:, None]
    y_tile_ptr = y_ptr + t.to(tl.int64)[None, :] * F + f[:, None]
    tl.store(y_tile_ptr, total, mask=in_features[:, None] & in_rows[None, :])


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of the output (`BLOCK_F` x `BLOCK_T`) and depth of one step of the sum."""

    BLOCK_F: int
    BLOCK_T: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def _launch_config(rows: int, itemsize: int) -> LaunchConfig:
    """64 weight rows, as many token columns as there are (16 to 64), 128 bytes of depth.

    Chosen by shape so that four stages fit 100 KB of shared memory; not yet measured on a GPU.
    """
    block_t = min(64, max(16, triton.next_power_of_2(rows)))
    return LaunchConfig(64, block_t, BLOCK_D=128 // itemsize, num_warps=4, num_stages=4)


@torch.library.custom_op("aerie::linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_launchable(x)
    (rows, depth), features = x.shape, weight.shape[0]
    y_TF = x.new_empty(rows, features)
    config = _launch_config(rows, x.element_size())
    if y_TF.numel() > 0:
        grid = (triton.cdiv(features, config.BLOCK_F), triton.cdiv(rows, config.BLOCK_T))
        _linear_kernel[grid](
            x,
            weight,
            weight if bias is None else bias,
            y_TF,
            x.stride(0),
            weight.stride(0),
            rows,
            depth,
            features,
            HAS_BIAS=bias is not None,
            BLOCK_F=config.BLOCK_F,
            BLOCK_T=config.BLOCK_T,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y_TF


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`x_TD @ weight_FD^T + bias_F`; returns [T, F] in the dtype of `x_TD`.

    Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    for name, operand in (("x_TD", x_TD), ("weight_FD", weight_FD)):
        if operand.ndim != 2 or operand.stride(-1) != 1 or operand.dtype not in DTYPES:
            raise ValueError(
                f"{name}: must be float32, float16 or bfloat16, two-dimensional, with a contiguous "
                f"last dimension, got {operand.dtype} {tuple(operand.shape)} {operand.stride()}"
            )
    if weight_FD.shape[1] != x_TD.shape[1] or weight_FD.dtype != x_TD.dtype:
        raise ValueError(
            f"weight_FD: must be {x_TD.dtype} [F, {x_TD.shape[1]}] like x_TD, "
            f"got {weight_FD.dtype} {tuple(weight_FD.shape)}"
        )
    if bias_F is not None and (bias_F.shape != weight_FD.shape[:1] or not bias_F.is_contiguous()):
        raise ValueError(
            f"bias_F: must be a contiguous [{weight_FD.shape[0]}], got {tuple(bias_F.shape)}"
        )
    return _linear_op(x_TD, weight_FD, bias_F)


class Linear(nn.Module):
    """Linear layer, parameters named as in Hugging Face checkpoints (`weight`, `bias`)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, backend: ResolvedBackend
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._linear = pick(backend, linear, linear_ref)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._linear(x_TD, self.weight, self.bias)
