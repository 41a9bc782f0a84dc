"""Rotary position embedding of queries and keys, with Llama 4's weightless norm behind it.

    (a, b) -> (a cos - b sin, b cos + a sin)    for every pair of a head     Su et al. 2021, eq. 34
    x -> x / sqrt(mean(x^2) + eps)              if `qk_norm_eps` is given    (no weight)

The pairs of a head are its neighbours (2j, 2j + 1) in the `interleaved` layout of Llama 4
checkpoints, and (j, j + K/2) in the `half` layout of llama-type drafts. The rotation is float32 and
rounded to the input dtype; the norm takes the rounded value, is float32 inside and is rounded
again, as in Hugging Face's Llama 4. Queries and keys go through one launch.

Letters: T rows, H query heads, G key/value heads, K head dimension, J pairs (K/2).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable, rounded, widened
from aerie.kernels.rms_norm import normalise_ref
from aerie.kernels.rotation import Rotation

Layout = Literal["interleaved", "half"]
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class RotatedHeads:
    """Rotated (and, if asked, normalised) queries and keys."""

    q_THK: Tensor
    k_TGK: Tensor


def rope_ref(
    q_THK: Tensor, k_TGK: Tensor, rotation: Rotation, layout: Layout, qk_norm_eps: float | None
) -> RotatedHeads:
    """The formula above in PyTorch, float32 inside."""
    heads = turn_ref(torch.cat((q_THK, k_TGK), dim=1), rotation, layout, qk_norm_eps)
    return RotatedHeads(*heads.split((q_THK.shape[1], k_TGK.shape[1]), dim=1))


def turn_ref(
    x_THK: Tensor, rotation: Rotation, layout: Layout, qk_norm_eps: float | None
) -> Tensor:
    """Rotation and norm of any heads; a pair is a complex number, of which neighbours are views."""
    wide = widened(x_THK)
    if layout == "half":
        half = wide.shape[-1] // 2
        pairs = torch.complex(*wide.split_with_sizes((half, half), dim=-1)) * rotation.turns_T1J
        rotated = torch.view_as_real(pairs).transpose(-1, -2).flatten(-2)
    else:
        rotated = (wide.view(wide.dtype.to_complex()) * rotation.turns_T1J).view(wide.dtype)
    rotated = rounded(rotated, x_THK.dtype)
    return rotated if qk_norm_eps is None else normalise_ref(rotated, qk_norm_eps)


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, cos_ptr, sin_ptr, stride_xt, stride_xh, first, total, heads, J, eps,
    INTERLEAVED: tl.constexpr, NORM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    head = first.to(tl.int64) + tl.arange(0, BLOCK_HEADS)  # of all heads of all rows
    t, h = head // heads, head % heads
    j, part = tl.arange(0, BLOCK_J), tl.arange(0, 2)
    in_heads, in_pairs = head < total, j < J
    in_angles = in_heads[:, None] & in_pairs[None, :]
    in_tile = in_angles[:, :, None] & (part < 2)[None, None, :]
    if INTERLEAVED:
        offset = (j[:, None] * 2 + part[None, :])[None, :, :]
    else:
        offset = (j[:, None] + part[None, :] * J)[None, :, :]
    x = tl.load(x_ptr + (t * stride_xt + h * stride_xh)[:, None, None] + offset, mask=in_tile)
    angle = t[:, None] * J + j[None, :]
    cos = tl.load(cos_ptr + angle, mask=in_angles, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=in_angles, other=0.0)
    a, b = tl.split(x.to(tl.float32))  # [BLOCK_HEADS, BLOCK_J] each
    y = tl.join(a * cos - b * sin, b * cos + a * sin).to(x.dtype)
    if NORM:
        y = tl.where(in_tile, y.to(tl.float32), 0.0)
        mean_square = tl.sum(tl.sum(y * y, axis=2), axis=1) / (2 * J)
        y = y / tl.sqrt(mean_square + eps)[:, None, None]
    tl.store(y_ptr + (head * 2 * J)[:, None, None] + offset, y.to(tl.float32), mask=in_tile)


@triton.jit(do_not_specialize=["T"])
def _rope_kernel(
    q_ptr,  # [T, H, K]
    k_ptr,  # [T, G, K]
    cos_ptr,  # [T, J]
    sin_ptr,  # [T, J]
    rotated_q_ptr,  # [T, H, K]
    rotated_k_ptr,  # [T, G, K]
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    T,
    H,
    G,
    J,
    eps,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(T * H, BLOCK_HEADS)
    if tile < q_tiles:
        _rotate_heads(
            q_ptr, rotated_q_ptr, cos_ptr, sin_ptr, stride_qt, stride_qh,
            tile * BLOCK_HEADS, T * H, H, J, eps,
            INTERLEAVED, NORM, BLOCK_HEADS, BLOCK_J,
        )  # fmt: skip
    else:
        _rotate_heads(
            k_ptr, rotated_k_ptr, cos_ptr, sin_ptr, stride_kt, stride_kg,
            (tile - q_tiles) * BLOCK_HEADS, T * G, G, J, eps,
            INTERLEAVED, NORM, BLOCK_HEADS, BLOCK_J,
        )  # fmt: skip


@dataclass(frozen=True)
class LaunchConfig:
    """One program rotates `BLOCK_HEADS` heads of the queries or of the keys."""

    BLOCK_HEADS: int
    BLOCK_J: int
    num_warps: int


def _launch_config(pairs: int) -> LaunchConfig:
    """About 1024 elements per program. Chosen by shape; not yet measured on a GPU."""
    block = triton.next_power_of_2(pairs)
    return LaunchConfig(BLOCK_HEADS=max(1, 512 // block), BLOCK_J=block, num_warps=4)


@torch.library.custom_op("aerie::rope", mutates_args=())
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, qk_norm_eps: float | None
) -> tuple[Tensor, Tensor]:
    check_launchable(q)
    (rows, heads, _), kv_heads, pairs = q.shape, k.shape[1], cos.shape[1]
    rotated_q, rotated_k = q.new_empty(q.shape), k.new_empty(k.shape)
    config = _launch_config(pairs)
    if rows > 0:
        tiles = [triton.cdiv(rows * n, config.BLOCK_HEADS) for n in (heads, kv_heads)]
        _rope_kernel[(sum(tiles),)](
            q,
            k,
            cos,
            sin,
            rotated_q,
            rotated_k,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            rows,
            heads,
            kv_heads,
            pairs,
            0.0 if qk_norm_eps is None else qk_norm_eps,
            INTERLEAVED=interleaved,
            NORM=qk_norm_eps is not None,
            BLOCK_HEADS=config.BLOCK_HEADS,
            BLOCK_J=config.BLOCK_J,
            num_warps=config.num_warps,
        )
    return rotated_q, rotated_k


@_rope_op.register_fake
def _(q, k, cos, sin, interleaved, qk_norm_eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rope(
    q_THK: Tensor, k_TGK: Tensor, rotation: Rotation, layout: Layout, qk_norm_eps: float | None
) -> RotatedHeads:
    """Rotates every head of `q_THK` and `k_TGK` (any row and head strides) by `rotation`.

    Raises ValueError on a layout name, shape, dtype or stride the kernel would read wrongly.
    """
    if layout not in ("interleaved", "half"):
        raise ValueError(f"layout: must be 'interleaved' or 'half', got {layout!r}")
    _check("q_THK", q_THK, rotation)
    _check("k_TGK", k_TGK, rotation)
    if k_TGK.dtype != q_THK.dtype:
        raise ValueError(f"k_TGK: must be {q_THK.dtype} like q_THK, got {k_TGK.dtype}")
    cos_TJ, sin_TJ = rotation.cos_TJ, rotation.sin_TJ
    for x_TJ in (cos_TJ, sin_TJ):
        if x_TJ.shape != cos_TJ.shape or x_TJ.dtype != torch.float32 or not x_TJ.is_contiguous():
            raise ValueError(
                f"rotation: must be two contiguous float32 [T, J], "
                f"got {x_TJ.dtype} {tuple(x_TJ.shape)} strides {x_TJ.stride()}"
            )
    return RotatedHeads(
        *_rope_op(q_THK, k_TGK, cos_TJ, sin_TJ, layout == "interleaved", qk_norm_eps)
    )


def _check(name: str, x_THK: Tensor, rotation: Rotation) -> None:
    check_dtype(name, x_THK)
    rows, pairs = rotation.cos_TJ.shape
    if x_THK.ndim != 3 or x_THK.stride(-1) != 1:
        raise ValueError(
            f"{name}: must be [T, heads, K] with a contiguous last dimension, "
            f"got {tuple(x_THK.shape)} strides {x_THK.stride()}"
        )
    if x_THK.shape[0] != rows or x_THK.shape[2] != 2 * pairs or 2 * pairs > MAX_HEAD_DIM:
        raise ValueError(
            f"{name}: must be [{rows}, heads, {2 * pairs}] to fit the rotation, with a head "
            f"dimension of at most {MAX_HEAD_DIM}, got {tuple(x_THK.shape)}"
        )
