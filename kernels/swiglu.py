"""SwiGLU: the gated activation between the two halves of a feed-forward block.

    y = silu(gate) * up,   silu(g) = g / (1 + exp(-g))          Shazeer 2020, arXiv 2002.05202

As in Hugging Face's eager Llama 4, silu is computed in float32 and rounded to the input dtype once
before the product. Gate and up may be column slices of one fused projection.

Letters: T rows, F feed-forward width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable


def swiglu_ref(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """The formula above in PyTorch."""
    return F.silu(gate_TF).mul_(up_TF)


def swiglu_halves_ref(gate_up_TF2: Tensor) -> Tensor:
    """`swiglu_ref` of the two halves of a packed projection, gate first."""
    width = gate_up_TF2.shape[-1] // 2
    gate_TF, up_TF = gate_up_TF2.split_with_sizes((width, width), dim=-1)
    return F.silu(gate_TF).mul_(up_TF)


@triton.jit
def _swiglu_kernel(
    gate_ptr,  # [T, F]
    up_ptr,  # [T, F]
    y_ptr,  # [T, F]
    stride_gt,
    stride_ut,
    F,
    BLOCK_F: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_row = f < F
    gate = tl.load(gate_ptr + t * stride_gt + f, mask=in_row, other=0.0)
    dtype = gate.dtype
    gate = gate.to(tl.float32)
    up = tl.load(up_ptr + t * stride_ut + f, mask=in_row, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(y_ptr + t * F + f, silu * up, mask=in_row)


@dataclass(frozen=True)
class LaunchConfig:
    """One program does `BLOCK_F` columns of one row."""

    BLOCK_F: int
    num_warps: int


def _launch_config(width: int) -> LaunchConfig:
    """Eight elements per thread, at most four warps. Chosen by shape; not yet measured on a GPU."""
    block = min(1024, triton.next_power_of_2(width))
    return LaunchConfig(BLOCK_F=block, num_warps=max(1, block // 256))


@torch.library.custom_op("aerie::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    check_launchable(gate)
    rows, width = gate.shape
    y_TF = gate.new_empty(gate.shape)
    config = _launch_config(width)
    if y_TF.numel() > 0:
        _swiglu_kernel[(rows, triton.cdiv(width, config.BLOCK_F))](
            gate,
            up,
            y_TF,
            gate.stride(0),
            up.stride(0),
            width,
            BLOCK_F=config.BLOCK_F,
            num_warps=config.num_warps,
        )
    return y_TF


@_swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`silu(gate_TF) * up_TF`; returns a contiguous [T, F] in the same dtype.

    Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    for name, x_TF in (("gate_TF", gate_TF), ("up_TF", up_TF)):
        check_dtype(name, x_TF)
        if x_TF.ndim != 2 or x_TF.stride(-1) != 1:
            raise ValueError(
                f"{name}: must be [T, F] with a contiguous last dimension, "
                f"got {x_TF.dtype} {tuple(x_TF.shape)} strides {x_TF.stride()}"
            )
    if up_TF.shape != gate_TF.shape or up_TF.dtype != gate_TF.dtype:
        raise ValueError(
            f"up_TF: must match gate_TF {tuple(gate_TF.shape)} {gate_TF.dtype}, "
            f"got {tuple(up_TF.shape)} {up_TF.dtype}"
        )
    return _swiglu_op(gate_TF, up_TF)
