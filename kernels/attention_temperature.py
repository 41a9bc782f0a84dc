"""Temperature of the attention of Llama 4's NoPE layers: queries grow with their position.

    q -> q * (1 + attn_scale * log1p(floor((position + 1) / floor_scale)))      arXiv 2501.19399

The scale and the product are float32, the result is rounded once. For Llama 4 the scale is 1 up to
position 8190, so a short test never sees it.

Letters: T rows, H query heads, K head dimension.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable, rounded, widened


def attention_temperature_ref(
    q_THK: Tensor, positions_T: Tensor, floor_scale: float, attn_scale: float
) -> Tensor:
    """The formula above in PyTorch, float32 inside."""
    wide = widened(q_THK)
    factors_T11 = temperature_factors(positions_T, floor_scale, attn_scale, wide.dtype)
    return rounded(wide * factors_T11, q_THK.dtype)


def temperature_factors(
    positions_T: Tensor, floor_scale: float, attn_scale: float, dtype: torch.dtype
) -> Tensor:
    """What multiplies the queries of each row, [T, 1, 1]."""
    steps_T = torch.floor((positions_T.to(dtype) + 1) / floor_scale)
    return (1 + attn_scale * torch.log1p(steps_T))[:, None, None]


@triton.jit(do_not_specialize=["T"])
def _attention_temperature_kernel(
    q_ptr,  # [T, H, K]
    positions_ptr,  # [T]
    y_ptr,  # [T, H, K]
    stride_qt,
    stride_qh,
    T,
    H,
    K,
    floor_scale,
    attn_scale,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    t, h = head // H, head % H
    k = tl.arange(0, BLOCK_K)
    in_heads = head < T.to(tl.int64) * H
    in_tile = in_heads[:, None] & (k < K)[None, :]
    position = tl.load(positions_ptr + t, mask=in_heads, other=0).to(tl.float32)
    # `/` is approximate on a GPU, and could fall short of a step at its very first position
    step = tl.floor(tl.div_rn(position + 1.0, floor_scale + tl.zeros_like(position)))
    scale = tl.log(1.0 + step) * attn_scale + 1.0  # step is a whole number: log1p gains nothing
    q = tl.load(q_ptr + (t * stride_qt + h * stride_qh)[:, None] + k[None, :], mask=in_tile)
    tl.store(y_ptr + (head * K)[:, None] + k[None, :], q.to(tl.float32) * scale[:, None], in_tile)


@dataclass(frozen=True)
class LaunchConfig:
    """One program scales `BLOCK_HEADS` heads."""

    BLOCK_HEADS: int
    BLOCK_K: int
    num_warps: int


def _launch_config(head_dim: int) -> LaunchConfig:
    """About 1024 elements per program. Chosen by shape; not yet measured on a GPU."""
    block = triton.next_power_of_2(head_dim)
    return LaunchConfig(BLOCK_HEADS=max(1, 1024 // block), BLOCK_K=block, num_warps=4)


@torch.library.custom_op("aerie::attention_temperature", mutates_args=())
def _attention_temperature_op(
    q: Tensor, positions: Tensor, floor_scale: float, attn_scale: float
) -> Tensor:
    check_launchable(q)
    rows, heads, head_dim = q.shape
    y_THK = q.new_empty(q.shape)
    config = _launch_config(head_dim)
    if y_THK.numel() > 0:
        _attention_temperature_kernel[(triton.cdiv(rows * heads, config.BLOCK_HEADS),)](
            q,
            positions,
            y_THK,
            q.stride(0),
            q.stride(1),
            rows,
            heads,
            head_dim,
            floor_scale,
            attn_scale,
            BLOCK_HEADS=config.BLOCK_HEADS,
            BLOCK_K=config.BLOCK_K,
            num_warps=config.num_warps,
        )
    return y_THK


@_attention_temperature_op.register_fake
def _(q: Tensor, positions: Tensor, floor_scale: float, attn_scale: float) -> Tensor:
    return q.new_empty(q.shape)


def attention_temperature(
    q_THK: Tensor, positions_T: Tensor, floor_scale: float, attn_scale: float
) -> Tensor:
    """Queries scaled by position (int64, absolute); returns a contiguous [T, H, K], same dtype.

    Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    if q_THK.ndim != 3 or q_THK.stride(-1) != 1:
        raise ValueError(
            f"q_THK: must be [T, H, K] with a contiguous last dimension, "
            f"got {q_THK.dtype} {tuple(q_THK.shape)} strides {q_THK.stride()}"
        )
    check_dtype("q_THK", q_THK)
    if (
        positions_T.shape != q_THK.shape[:1]
        or positions_T.dtype != torch.int64
        or not positions_T.is_contiguous()
    ):
        raise ValueError(
            f"positions_T: must be a contiguous int64 [{q_THK.shape[0]}], "
            f"got {positions_T.dtype} {tuple(positions_T.shape)}"
        )
    if not floor_scale > 0:
        raise ValueError(f"floor_scale: must be positive, got {floor_scale}")
    return _attention_temperature_op(q_THK, positions_T, floor_scale, attn_scale)
