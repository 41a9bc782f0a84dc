"""What stands between the packed projection and attention, in one launch.

    q, k, v = split(qkv)      q, k = norm(rotate(q, k))      q = q * temperature(position)
    cache[slot] = k, v        for every row whose slot is not negative

Rotation, weightless norm and temperature are those of `rope` and `attention_temperature`, each may
be absent, and each rounds to the model dtype, as in Hugging Face: Llama 4 rotates and norms in its
RoPE layers and scales queries in its NoPE layers. Five launches of a few microseconds would cost
more than their work. An FP8 cache (e4m3) gets round(x / scale), held to +-448, of the rounded x.

The slots of one call are distinct, as two rows in one slot would race.

Letters: T rows, F columns of the projection, H query heads, G kv heads, K head dimension, J pairs
(K / 2), R pages, C tokens per page.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aerie.kernels.attention_prologue_kernel import _attention_prologue_kernel
from aerie.kernels.backend import check_launchable, rounded, widened
from aerie.kernels.kv_append import kv_append_ref
from aerie.kernels.prologue_checks import FP8_MAX, Temperature, check_prologue
from aerie.kernels.rope import Layout, turn_ref
from aerie.kernels.rotation import Rotation
from aerie.kernels.stream_launch import scale_stride

__all__ = ["Temperature", "attention_prologue", "attention_prologue_ref"]


def attention_prologue_ref(
    qkv_TF: Tensor,
    k_cache_RCGK: Tensor,
    v_cache_RCGK: Tensor,
    slots_T: Tensor,
    *,
    rotation: Rotation | None = None,
    layout: Layout = "interleaved",
    qk_norm_eps: float | None = None,
    temperature: Temperature | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The references of the single steps, one after the other; writes the caches in place."""
    kv_heads, head_dim = k_cache_RCGK.shape[2:]
    heads = qkv_TF.view(qkv_TF.shape[0], qkv_TF.shape[1] // head_dim, head_dim)
    num_turned = heads.shape[1] - kv_heads
    turned, v_TGK = heads.split_with_sizes((num_turned, kv_heads), dim=1)
    if rotation is not None:
        turned = turn_ref(turned, rotation, layout, qk_norm_eps)
    q_THK, k_TGK = turned.split_with_sizes((num_turned - kv_heads, kv_heads), dim=1)
    if temperature is not None:
        wide_THK = widened(q_THK)
        q_THK = rounded(wide_THK * temperature.factors_T11(wide_THK.dtype), q_THK.dtype)
    if k_scale is not None and v_scale is not None:
        k_TGK, v_TGK = _codes(k_TGK, k_scale), _codes(v_TGK, v_scale)
        k_cache_RCGK, v_cache_RCGK = (x.view(torch.uint8) for x in (k_cache_RCGK, v_cache_RCGK))
    kv_append_ref(k_TGK, v_TGK, k_cache_RCGK, v_cache_RCGK, slots_T)
    return q_THK


def _codes(x_TGK: Tensor, scale: Tensor) -> Tensor:
    """The bytes of the FP8 codes: PyTorch copies no FP8 by index on every device."""
    codes = (x_TGK.float() / scale.float()[:, None]).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn).view(torch.uint8)


@dataclass(frozen=True)
class LaunchConfig:
    """One program does `BLOCK_HEADS` heads of queries, keys and values, mixed."""

    BLOCK_HEADS: int
    BLOCK_J: int
    num_warps: int


def _launch_config(pairs: int) -> LaunchConfig:
    """About 1024 elements per program. Chosen by shape; not yet measured on a GPU."""
    block = triton.next_power_of_2(pairs)
    return LaunchConfig(BLOCK_HEADS=max(1, 512 // block), BLOCK_J=block, num_warps=4)


@torch.library.custom_op("aerie::attention_prologue", mutates_args=("k_cache", "v_cache"))
def _attention_prologue_op(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    qk_norm_eps: float | None,
    positions: Tensor | None,
    floor_scale: float,
    attn_scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    check_launchable(qkv)
    (rows, width), (kv_heads, head_dim) = qkv.shape, k_cache.shape[2:]
    heads, pairs = width // head_dim - 2 * kv_heads, head_dim // 2
    q_THK = qkv.new_empty(rows, heads, head_dim)
    config = _launch_config(pairs)
    if rows > 0:
        _attention_prologue_kernel[(triton.cdiv(rows * width // head_dim, config.BLOCK_HEADS),)](
            qkv,
            slots if cos is None else cos,
            slots if sin is None else sin,
            slots if positions is None else positions,
            slots,
            slots if k_scale is None else k_scale,
            slots if v_scale is None else v_scale,
            q_THK,
            k_cache,
            v_cache,
            qkv.stride(0),
            scale_stride(k_scale),
            scale_stride(v_scale),
            rows,
            heads,
            kv_heads,
            pairs,
            0.0 if qk_norm_eps is None else qk_norm_eps,
            floor_scale,
            attn_scale,
            ROTATE=cos is not None,
            INTERLEAVED=interleaved and cos is not None,  # plain heads are read in order
            NORM=qk_norm_eps is not None,
            HAS_TEMPERATURE=positions is not None,
            HAS_SCALES=k_scale is not None,
            BLOCK_HEADS=config.BLOCK_HEADS,
            BLOCK_J=config.BLOCK_J,
            num_warps=config.num_warps,
        )
    return q_THK


@_attention_prologue_op.register_fake
def _(qkv: Tensor, k_cache: Tensor, *_: object) -> Tensor:
    kv_heads, head_dim = k_cache.shape[2:]
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)


def attention_prologue(
    qkv_TF: Tensor,
    k_cache_RCGK: Tensor,
    v_cache_RCGK: Tensor,
    slots_T: Tensor,
    *,
    rotation: Rotation | None = None,
    layout: Layout = "interleaved",
    qk_norm_eps: float | None = None,
    temperature: Temperature | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The queries [T, H, K] of `qkv_TF` [T, (H + 2 G) K]; its keys and values go to the caches.

    `qkv_TF` may have any row stride. An FP8 cache (float8_e4m3fn) comes with `k_scale` and
    `v_scale`, float32 [G] or [1]. Raises ValueError on a shape, dtype, device or layout the kernel
    would read or write wrongly.
    """
    caches, scales = (k_cache_RCGK, v_cache_RCGK), (k_scale, v_scale)
    check_prologue(qkv_TF, caches, slots_T, rotation, layout, qk_norm_eps, temperature, scales)
    return _attention_prologue_op(
        qkv_TF,
        k_cache_RCGK,
        v_cache_RCGK,
        slots_T,
        None if rotation is None else rotation.cos_TJ,
        None if rotation is None else rotation.sin_TJ,
        layout == "interleaved",
        qk_norm_eps,
        None if temperature is None else temperature.positions_T,
        1.0 if temperature is None else temperature.floor_scale,
        0.0 if temperature is None else temperature.attn_scale,
        k_scale,
        v_scale,
    )
