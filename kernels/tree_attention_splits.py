"""How many shares `tree_attention` cuts the keys of a launch into, and what it reads then.

Pure functions of the shapes that the host knows: a captured graph keeps its launch, while lengths
change on the device. Nothing here was measured on a GPU.
"""

import triton

from aerie.kernels.stream_launch import SMS

MIN_KEYS = 256  # of a share, at full capacity: below, its partial result weighs as much as its keys
MAX_SPLITS = 32  # a warp's lanes; more shares than that only make the merge longer


def split_count(
    m_tiles: int, groups: int, capacity: int, chunk_size: int | None, max_rows: int
) -> int:
    """Shares for `m_tiles` tiles of rows of `groups` pairs of a sequence and a kv head.

    Up to two tiles of rows the keys' bandwidth is the limit, and two programs per SM hide it. With
    more, arithmetic is, a program fills an SM, and the partial results of 64 rows are large: one
    program per SM. 8 kv heads: 32 shares up to 12 rows of 5 query heads, 3 for a tree of 64.
    """
    span = capacity if chunk_size is None else min(capacity, chunk_size + max_rows)
    slots = 2 * SMS if m_tiles <= 2 else SMS
    return max(1, min(slots // max(1, m_tiles * groups), span // MIN_KEYS, MAX_SPLITS))


def kv_bytes_read(
    packed_rows: int, block_m: int, keys: int, kv_heads: int, head_dim: int, itemsize: int
) -> int:
    """Bytes of the keys and values that one sequence's launch reads, however many shares.

    Every tile of packed rows reads each of its `keys` visible keys once. Tiles of one sequence run
    side by side, so that beyond the first the reads may come from the L2 cache.
    """
    tiles = triton.cdiv(packed_rows, block_m)
    return tiles * keys * 2 * kv_heads * head_dim * itemsize
