"""Commit: move the keys and values of an accepted tree path to the front of the new region.

    cache[l, target[p]] = cache[l, source[p]]        for all layers l, p ascending

After a tree step the accepted rows lie scattered among the rejected ones. Row number row[p] of the
tree lies in logical slot prefix + row[p] and belongs in prefix + p. Row numbers rise along a path,
so row[p] >= p and an earlier target, prefix + p' with p' < p, is never a later source: in ascending
order the move is safe in place. A pair with a negative slot is padding and is skipped, and so is a
pair whose slots are equal (all pairs of a chain). Slots are flat: page * C + offset. Paths of
several sequences may follow each other in one call, for their slots are disjoint.

Letters: P path nodes, L layers, R pages, C tokens per page, G kv heads, K head dimension.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable


def cache_commit_ref(
    k_cache_LRCGK: Tensor, v_cache_LRCGK: Tensor, source_slots_P: Tensor, target_slots_P: Tensor
) -> None:
    """The moves above in PyTorch, in place; a gather in between replaces the order."""
    moved = (source_slots_P >= 0) & (target_slots_P >= 0) & (source_slots_P != target_slots_P)
    source_P, target_P = source_slots_P[moved], target_slots_P[moved]
    if source_P.numel() == 0:
        return
    for cache_LRCGK in map(_bytewise, (k_cache_LRCGK, v_cache_LRCGK)):
        flat_LSGK = cache_LRCGK.flatten(1, 2)
        flat_LSGK.index_copy_(1, target_P, flat_LSGK.index_select(1, source_P))


def _bytewise(cache_LRCGK: Tensor) -> Tensor:
    """FP8 codes as bytes: PyTorch moves no FP8 by index on every device, nor sm_80 at all."""
    return cache_LRCGK.view(torch.uint8) if cache_LRCGK.itemsize == 1 else cache_LRCGK


@triton.jit(do_not_specialize=["P"])
def _cache_commit_kernel(
    k_cache_ptr,  # [L, R, C, G, K]
    v_cache_ptr,  # [L, R, C, G, K]
    source_slots_ptr,  # [P]
    target_slots_ptr,  # [P]
    stride_kl,
    stride_vl,
    P,
    WIDTH,
    BLOCK_W: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    k_columns = k_cache_ptr + layer * stride_kl + w
    v_columns = v_cache_ptr + layer * stride_vl + w
    for p in range(0, P):
        source = tl.load(source_slots_ptr + p)
        target = tl.load(target_slots_ptr + p)
        is_move = (source >= 0) & (target >= 0) & (source != target)
        moved = w < tl.where(is_move, WIDTH, 0)
        key = tl.load(k_columns + source * WIDTH, mask=moved)
        value = tl.load(v_columns + source * WIDTH, mask=moved)
        # a source may be a later target: every thread must have read it before one writes there
        tl.debug_barrier()
        tl.store(k_columns + target * WIDTH, key, mask=moved)
        tl.store(v_columns + target * WIDTH, value, mask=moved)


@dataclass(frozen=True)
class LaunchConfig:
    """One layer and `BLOCK_W` columns of a slot per program, which walks the whole path."""

    BLOCK_W: int


def _launch_config(width: int) -> LaunchConfig:
    """A whole slot per program up to 1024 columns. Not yet measured on a GPU."""
    return LaunchConfig(BLOCK_W=min(1024, triton.next_power_of_2(width)))


@torch.library.custom_op("aerie::cache_commit", mutates_args=("k_cache", "v_cache"))
def _cache_commit_op(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    check_launchable(k_cache)
    width = k_cache.shape[3] * k_cache.shape[4]
    config = _launch_config(width)
    if source.numel() == 0 or k_cache.numel() == 0:
        return
    _cache_commit_kernel[(k_cache.shape[0], triton.cdiv(width, config.BLOCK_W))](
        k_cache,
        v_cache,
        source,
        target,
        k_cache.stride(0),
        v_cache.stride(0),
        source.numel(),
        width,
        BLOCK_W=config.BLOCK_W,
    )


@_cache_commit_op.register_fake
def _(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    return None


def cache_commit(
    k_cache_LRCGK: Tensor, v_cache_LRCGK: Tensor, source_slots_P: Tensor, target_slots_P: Tensor
) -> None:
    """Copies slot `source_slots_P[p]` to slot `target_slots_P[p]` in every layer, in place.

    Raises ValueError on a shape, dtype or layout the kernel would read or write wrongly.
    """
    for name, cache in (("k_cache_LRCGK", k_cache_LRCGK), ("v_cache_LRCGK", v_cache_LRCGK)):
        is_alike = (cache.shape, cache.dtype) == (k_cache_LRCGK.shape, k_cache_LRCGK.dtype)
        if cache.ndim != 5 or not cache[0].is_contiguous() or not is_alike:
            raise ValueError(
                f"{name}: must be [L, R, C, G, K] with contiguous layers, as the other cache, "
                f"got {cache.dtype} {tuple(cache.shape)} strides {cache.stride()}"
            )
    for name, slots in (("source_slots_P", source_slots_P), ("target_slots_P", target_slots_P)):
        if slots.ndim != 1 or slots.dtype != torch.int64 or not slots.is_contiguous():
            raise ValueError(
                f"{name}: must be a contiguous int64 [P], got {tuple(slots.shape)} {slots.dtype}"
            )
    if source_slots_P.shape != target_slots_P.shape:
        raise ValueError(
            f"target_slots_P: must have the {source_slots_P.numel()} entries of source_slots_P, "
            f"got {target_slots_P.numel()}"
        )
    caches = _bytewise(k_cache_LRCGK), _bytewise(v_cache_LRCGK)
    _cache_commit_op(*caches, source_slots_P, target_slots_P)
