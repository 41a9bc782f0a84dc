"""Which layers share a pool of pages, and how many pages a sequence needs there: pure arithmetic.

A layer of full attention keeps every position. A chunked layer, as three of four in Llama 4, never
looks back past the chunk of the first row of a step, so its pages form a ring: logical page m of a
sequence lies in page m mod R of its R pages. Two logical slots meet in one place only if they are
R * C apart, therefore with

    R * C >= chunk - 1 + rows of one step

a step that starts at the committed length n overwrites no slot from floor(n / chunk) * chunk on.
That is all its own rows see, and all that a later step sees, however many of the rows are rejected:
the committed length alone decides, and it never falls below n (`PagedKVCache.rollback` aside).

Letters: R pages of a sequence in the pool, C tokens per page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PAGE_SIZE = 64  # of the caches that models allocate unless told otherwise


@dataclass(frozen=True)
class PoolPlan:
    """Layers whose pages are alike. In a ring `num_pages` is less than `num_logical_pages`."""

    layers: tuple[int, ...]
    num_pages: int  # of one sequence
    num_logical_pages: int  # of one sequence: the columns of its page table
    chunk_size: int | None  # of a ring; None: every position is kept

    def bytes(self, page_size: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Keys and values of one sequence in all layers of the pool."""
        return (
            2 * len(self.layers) * self.num_pages * page_size * num_kv_heads * head_dim * itemsize
        )


def plan_pools(
    chunk_sizes: Sequence[int | None], max_length: int, page_size: int, max_step_rows: int
) -> tuple[PoolPlan, ...]:
    """Pools for layers of the given chunk sizes (None: full attention); the full one comes first.

    A layer whose ring would be no shorter than `max_length` joins the full pool.
    """
    logical = -(-max_length // page_size)
    layers_of: dict[int | None, list[int]] = {}
    for layer, chunk_size in enumerate(chunk_sizes):
        is_ring = chunk_size is not None and _ring(chunk_size, page_size, max_step_rows) < logical
        layers_of.setdefault(chunk_size if is_ring else None, []).append(layer)
    plans = [
        PoolPlan(
            tuple(layers),
            logical if chunk_size is None else _ring(chunk_size, page_size, max_step_rows),
            logical,
            chunk_size,
        )
        for chunk_size, layers in layers_of.items()
    ]
    return tuple(sorted(plans, key=lambda plan: plan.chunk_size is not None))


def pages_in_pool(plan: PoolPlan, num_sequences: int, num_pages: int | None) -> int:
    """Pages of a pool that `num_sequences` share, where the largest pool has `num_pages`.

    None: all that they can need. A sequence needs no more pages in a ring than in the full pool.
    """
    most = num_sequences * plan.num_pages
    return most if num_pages is None else min(most, num_pages)


def _ring(chunk_size: int, page_size: int, max_step_rows: int) -> int:
    return -(-(chunk_size - 1 + max_step_rows) // page_size)
