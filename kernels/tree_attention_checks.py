"""What `tree_attention` refuses: every ValueError names the argument, the rule and the value."""

import torch
from torch import Tensor

from aerie.kernels.stream_launch import DTYPES, FP8
from aerie.kernels.target import lacks_fp8
from aerie.kernels.tree_rows import MAX_TREE_ROWS, TreeRows

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128  # of the Triton kernel
MOST_SPLITS = 64  # that a caller may pin


def check_call(
    q_THK: Tensor,
    k_cache_RCGK: Tensor,
    v_cache_RCGK: Tensor,
    rows: TreeRows,
    chunk_size: int | None,
    num_splits: int | None,
) -> None:
    """Raises ValueError on queries, caches or rows that the kernels would read wrongly."""
    _check_queries(q_THK)
    _check_caches(q_THK, k_cache_RCGK, v_cache_RCGK)
    _check_rows(q_THK, rows)
    capacity = rows.page_table_BM.shape[1] * k_cache_RCGK.shape[1]
    if rows.max_rows > capacity:
        raise ValueError(
            f"rows.page_table_BM: must have room for max_rows {rows.max_rows}, got "
            f"{tuple(rows.page_table_BM.shape)} pages of {k_cache_RCGK.shape[1]} slots"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: must be None or at least 1, got {chunk_size}")
    if num_splits is not None and not 1 <= num_splits <= MOST_SPLITS:
        raise ValueError(f"num_splits: must be None or 1 to {MOST_SPLITS}, got {num_splits}")


def check_scales(cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raises ValueError unless FP8 caches, and only they, come with scales."""
    is_fp8, kv_heads = cache.dtype == FP8, cache.shape[2]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != is_fp8:
            given = "none" if scale is None else "one"
            raise ValueError(
                f"{name}: must be given with {FP8} caches and only then, got {given} for "
                f"{cache.dtype}"
            )
        if scale is None:
            continue
        is_vector = scale.ndim == 1 and scale.numel() in (1, kv_heads) and scale.is_contiguous()
        if not is_vector or scale.dtype != torch.float32 or scale.device != cache.device:
            raise ValueError(
                f"{name}: must be a contiguous float32 [{kv_heads}] or [1] on {cache.device}, "
                f"got {scale.dtype} {tuple(scale.shape)} on {scale.device}"
            )
    capability = lacks_fp8(cache) if is_fp8 else None
    if capability is not None:
        raise ValueError(f"k_cache_RCGK: FP8 needs CUDA capability 8.9 or later, got {capability}")


def check_values(
    rows: TreeRows, num_rows: int, num_pages: int, page_size: int, chunk_size: int | None
) -> None:
    """Raises ValueError on numbers that would read foreign memory or another tree than was meant.

    Reads all of them, so only where they lie on the host.
    """
    starts = rows.row_starts_B1.tolist()
    for b, prefix in enumerate(rows.prefix_lengths_B.tolist()):
        start, stop = starts[b : b + 2]
        if not 0 <= start <= stop <= min(num_rows, start + rows.max_rows):
            raise ValueError(
                f"rows.row_starts_B1: must rise from 0 to at most {num_rows}, by at most max_rows "
                f"{rows.max_rows}, got {starts}"
            )
        capacity, end = rows.page_table_BM.shape[1] * page_size, prefix + stop - start
        if prefix < 0 or end > capacity:
            raise ValueError(
                f"rows.prefix_lengths_B, rows.page_table_BM: must be 0 or more, and hold it and "
                f"the new rows, got {prefix} and {stop - start} for {capacity} slots"
            )
        _check_tree(rows, slice(start, stop), prefix)
        first = 0 if chunk_size is None else prefix // chunk_size * chunk_size
        used = rows.page_table_BM[b, first // page_size : -(-end // page_size)].tolist()
        if stop > start and not all(0 <= page < num_pages for page in used):
            raise ValueError(
                f"rows.page_table_BM: entries of slots {first} to {end - 1} must be 0 to "
                f"{num_pages - 1}, got {used} for sequence {b}"
            )


def _check_tree(rows: TreeRows, own: slice, prefix: int) -> None:
    """Row i has at most i ancestors, and sees itself and no new row behind it."""
    is_chain = rows.ancestors_T is None
    for i, position in enumerate(rows.positions_T[own].tolist()):
        if not (prefix + i if is_chain else prefix) <= position <= prefix + i:
            raise ValueError(
                f"rows.positions_T: row {i} behind {prefix} slots must stand at "
                f"{prefix + i}{'' if is_chain else ' or less, not in the prefix'}, got {position}"
            )
    if rows.ancestors_T is None:
        return
    for i, word in enumerate(rows.ancestors_T[own].tolist()):
        if (word % 2**64) >> i != 1:
            raise ValueError(
                f"rows.ancestors_T: row {i} must see itself and no row behind it (parents come "
                f"before their children), got the word {word % 2**64:#x}"
            )


def _check_queries(q_THK: Tensor) -> None:
    in_range = MIN_HEAD_DIM <= q_THK.shape[-1] <= MAX_HEAD_DIM
    if q_THK.ndim != 3 or q_THK.stride(-1) != 1 or not in_range:
        raise ValueError(
            f"q_THK: must be [T, H, K] with a contiguous K of {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, "
            f"got shape {tuple(q_THK.shape)} strides {q_THK.stride()}"
        )
    if q_THK.dtype not in DTYPES:
        raise ValueError(f"q_THK: must be one of {DTYPES}, got {q_THK.dtype}")


def _check_caches(q_THK: Tensor, k_cache_RCGK: Tensor, v_cache_RCGK: Tensor) -> None:
    for name, cache in (("k_cache_RCGK", k_cache_RCGK), ("v_cache_RCGK", v_cache_RCGK)):
        if cache.ndim != 4 or not cache.is_contiguous() or cache.shape[3] != q_THK.shape[2]:
            raise ValueError(
                f"{name}: must be a contiguous [R, C, G, {q_THK.shape[2]}], "
                f"got shape {tuple(cache.shape)} strides {cache.stride()}"
            )
        allowed = (q_THK.dtype, FP8) if cache is k_cache_RCGK else (k_cache_RCGK.dtype,)
        if cache.dtype not in allowed or cache.device != q_THK.device:
            raise ValueError(
                f"{name}: must be {' or '.join(map(str, allowed))} on {q_THK.device}, "
                f"got {cache.dtype} on {cache.device}"
            )
    _, page_size, kv_heads, _ = k_cache_RCGK.shape
    if v_cache_RCGK.shape != k_cache_RCGK.shape or q_THK.shape[1] % kv_heads:
        raise ValueError(
            f"v_cache_RCGK, q_THK: must match k_cache_RCGK {tuple(k_cache_RCGK.shape)} (H a "
            f"multiple of G), got {tuple(v_cache_RCGK.shape)} and {q_THK.shape[1]} heads"
        )
    if page_size & (page_size - 1):
        raise ValueError(f"k_cache_RCGK: page size must be a power of two, got {page_size}")


def _check_rows(q_THK: Tensor, rows: TreeRows) -> None:
    per_row = {"positions_T": rows.positions_T, "ancestors_T": rows.ancestors_T}
    for name, x in per_row.items():
        if x is not None and (x.shape != q_THK.shape[:1] or x.dtype != torch.int64):
            raise ValueError(
                f"rows.{name}: must be int64 [{q_THK.shape[0]}], got {tuple(x.shape)} {x.dtype}"
            )
    sequences = rows.prefix_lengths_B.numel()
    if rows.row_starts_B1.numel() != sequences + 1 or rows.page_table_BM.shape[0] != sequences:
        raise ValueError(
            f"rows: row_starts_B1 and page_table_BM must fit {sequences} prefix lengths, "
            f"got {tuple(rows.row_starts_B1.shape)} and {tuple(rows.page_table_BM.shape)}"
        )
    for name in ("row_starts_B1", "prefix_lengths_B", "page_table_BM", *per_row):
        x, dtype = getattr(rows, name), torch.int64 if name in per_row else torch.int32
        if x is not None and (x.stride(-1) != 1 or x.dtype != dtype or x.device != q_THK.device):
            raise ValueError(
                f"rows.{name}: must be {dtype} with a contiguous last dimension on {q_THK.device}, "
                f"got {x.dtype}, strides {x.stride()}, on {x.device}"
            )
    if rows.max_rows < 1 or (rows.ancestors_T is not None and rows.max_rows > MAX_TREE_ROWS):
        raise ValueError(
            f"rows.max_rows: must be at least 1, and at most {MAX_TREE_ROWS} with ancestors, "
            f"got {rows.max_rows}"
        )
