"""Append: write the keys and values of this step's rows into their slots of the paged cache.

    cache[slot // C, slot % C] = row             for every row whose slot is not negative

A flat slot is page * C + offset. Rows with a negative slot are padding and are dropped. The slots
of one call are distinct, as two rows in one slot would race. No arithmetic: the values are copied
bit by bit.

Letters: T rows, R pages, C tokens per page, G kv heads, K head dimension.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable


def kv_append_ref(
    k_TGK: Tensor, v_TGK: Tensor, k_cache_RCGK: Tensor, v_cache_RCGK: Tensor, slots_T: Tensor
) -> None:
    """The assignment above in PyTorch, in place."""
    if min(slots_T.tolist(), default=0) < 0:
        kept = slots_T >= 0
        k_TGK, v_TGK, slots_T = k_TGK[kept], v_TGK[kept], slots_T[kept]
    G, K = k_TGK.shape[1:]
    k_cache_RCGK.view(-1, G, K).index_copy_(0, slots_T, k_TGK)
    v_cache_RCGK.view(-1, G, K).index_copy_(0, slots_T, v_TGK)


@triton.jit(do_not_specialize=["T"])
def _kv_append_kernel(
    k_ptr,  # [T, G, K]
    v_ptr,  # [T, G, K]
    k_cache_ptr,  # [R, C, G, K]
    v_cache_ptr,  # [R, C, G, K]
    slots_ptr,  # [T]
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
    T,
    G,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    slot = tl.load(slots_ptr + t, mask=t < T, other=-1)
    written = (slot >= 0)[:, None] & (w < G * K)[None, :]
    g, k = (w // K).to(tl.int64), w % K
    key = tl.load(k_ptr + t[:, None] * stride_kt + (g * stride_kg + k)[None, :], mask=written)
    value = tl.load(v_ptr + t[:, None] * stride_vt + (g * stride_vg + k)[None, :], mask=written)
    target = slot[:, None] * (G * K) + w[None, :]
    tl.store(k_cache_ptr + target, key, mask=written)
    tl.store(v_cache_ptr + target, value, mask=written)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of rows by columns; a column is one (kv head, dimension) pair."""

    BLOCK_T: int
    BLOCK_W: int


def _launch_config(width: int) -> LaunchConfig:
    """A row in one tile up to 1024 columns, 2048 elements a tile. Not yet measured on a GPU."""
    block_w = min(1024, triton.next_power_of_2(width))
    return LaunchConfig(BLOCK_T=min(16, 2048 // block_w), BLOCK_W=block_w)


@torch.library.custom_op("aerie::kv_append", mutates_args=("k_cache", "v_cache"))
def _kv_append_op(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    check_launchable(k_cache)
    rows, heads, head_dim = k.shape
    width = heads * head_dim
    config = _launch_config(width)
    if rows == 0:
        return
    grid = (triton.cdiv(rows, config.BLOCK_T), triton.cdiv(width, config.BLOCK_W))
    _kv_append_kernel[grid](
        k,
        v,
        k_cache,
        v_cache,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        rows,
        heads,
        head_dim,
        BLOCK_T=config.BLOCK_T,
        BLOCK_W=config.BLOCK_W,
    )


@_kv_append_op.register_fake
def _(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    return None


def kv_append(
    k_TGK: Tensor, v_TGK: Tensor, k_cache_RCGK: Tensor, v_cache_RCGK: Tensor, slots_T: Tensor
) -> None:
    """Writes row t of `k_TGK` and `v_TGK` to flat slot `slots_T[t]` of the caches, in place.

    Raises ValueError on a shape, dtype or layout the kernel would read or write wrongly.
    """
    for name, cache in (("k_cache_RCGK", k_cache_RCGK), ("v_cache_RCGK", v_cache_RCGK)):
        is_alike = cache.shape == k_cache_RCGK.shape
        if cache.ndim != 4 or not cache.is_contiguous() or not is_alike:
            raise ValueError(
                f"{name}: must be a contiguous [R, C, G, K] (one layer of a stacked cache is), "
                f"as the other cache, "
                f"got shape {tuple(cache.shape)} strides {cache.stride()}"
            )
    _check_rows("k_TGK", k_TGK, k_cache_RCGK)
    _check_rows("v_TGK", v_TGK, v_cache_RCGK)
    if slots_T.shape != k_TGK.shape[:1] or v_TGK.shape != k_TGK.shape:
        raise ValueError(
            f"slots_T, v_TGK: must have the {k_TGK.shape[0]} rows of k_TGK, "
            f"got {tuple(slots_T.shape)} and {tuple(v_TGK.shape)}"
        )
    if slots_T.dtype != torch.int64 or not slots_T.is_contiguous():
        raise ValueError(f"slots_T: must be contiguous int64, got {slots_T.dtype}")
    _kv_append_op(k_TGK, v_TGK, k_cache_RCGK, v_cache_RCGK, slots_T)


def _check_rows(name: str, rows_TGK: Tensor, cache_RCGK: Tensor) -> None:
    if rows_TGK.ndim != 3 or rows_TGK.shape[1:] != cache_RCGK.shape[2:]:
        raise ValueError(
            f"{name}: must be [T, G, K] with the heads of the cache "
            f"{tuple(cache_RCGK.shape[2:])}, got {tuple(rows_TGK.shape)}"
        )
    if rows_TGK.stride(-1) != 1 or rows_TGK.dtype != cache_RCGK.dtype:
        raise ValueError(
            f"{name}: must have a contiguous last dimension and the cache's {cache_RCGK.dtype}, "
            f"got strides {rows_TGK.stride()} and {rows_TGK.dtype}"
        )
