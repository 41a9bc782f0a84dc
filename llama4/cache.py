"""A paged key/value cache with static allocation, used by the target and by the draft.

A step appends the keys and values of its rows behind the committed length; what it appended counts
only once `commit` says which rows were accepted, so a rejected row needs no undo: the next step
overwrites it.

    slots:    0 .. length-1         committed, one per position
              length .. length+n-1  rows of the running step, in row order (a tree's rows too)

Layers of full attention share one page table per sequence, chunked layers another, whose pages are
used again once no row can see them (`kv_plan`). The methods here know all lengths on the host; the
steps of a decoding loop, whose lengths stay on the device, are in `device_steps`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.cache_commit import cache_commit, cache_commit_ref
from aerie.kernels.stream_launch import FP8
from aerie.kernels.tree_attention import MAX_TREE_ROWS, TreeRows
from aerie.llama4.kv_plan import PAGE_SIZE, pages_in_pool, plan_pools
from aerie.llama4.kv_pool import KVPool
from aerie.llama4.kv_scales import KVScales
from aerie.llama4.step import Placement, Step, Tree

MAX_STEP_ROWS = 1024  # rows of a sequence in one step, unless a cache is allocated for more


@dataclass(frozen=True)
class LayerKV:
    """The part of the cache that one layer reads and writes; `pool` is its placement in a step."""

    pool: int
    k_RCGK: Tensor
    v_RCGK: Tensor
    k_scale: Tensor | None  # float32 [1] or [G], of FP8 codes only
    v_scale: Tensor | None


class PagedKVCache:
    """Keys and values of all layers; `lengths[b]` slots of sequence b are committed.

    Pages are allotted at construction (`max_length` slots per sequence), or by `admit` from a pool
    of `num_pages`, and never move. A chunked layer keeps the chunk that the committed length lies
    in and the rows of one step: it is allotted no more, if that is less (`layers[i].pool` then
    differs between chunked and other layers).
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        *,
        chunk_sizes: Sequence[int | None] | None = None,
        kv_scales: Sequence[KVScales] | None = None,
        max_step_rows: int = MAX_STEP_ROWS,
        num_sequences: int = 1,
        num_pages: int | None = None,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: ResolvedBackend = "eager",
    ) -> None:
        """`chunk_sizes` and `kv_scales` have an entry per layer: a chunk size of None, as no list
        means, is full attention. `dtype` float8_e4m3fn keeps codes; their scales are 1 by default.
        With `num_pages` (of the layers that keep most) sequences have no pages before `admit`.

        Raises ValueError where the memory does not suffice.
        """
        chunk_sizes = chunk_sizes or [None] * num_layers
        kv_scales = kv_scales or [KVScales.ones()] * num_layers
        assert len(chunk_sizes) == len(kv_scales) == num_layers
        plans = plan_pools(chunk_sizes, max_length, page_size, max_step_rows)
        row_shape = (page_size, num_kv_heads, head_dim)
        self.pools = [
            KVPool(
                plan,
                num_sequences,
                pages_in_pool(plan, num_sequences, num_pages),
                row_shape,
                dtype,
                device,
            )
            for plan in plans
        ]
        self.layers = _layers(self.pools, kv_scales)
        self.lengths = [0] * num_sequences
        self.max_length = max_length
        self.max_step_rows = max_step_rows
        self._rings = [pool for pool in self.pools if pool.plan.chunk_size is not None]
        self._step_rows = [0] * num_sequences  # what the last step appended
        self._device = self.pools[0].k_LRCGK.device
        self.move_slots = pick(backend, cache_commit, cache_commit_ref)
        if num_pages is None:
            for sequence in range(num_sequences):
                self.admit(sequence, max_length)

    def has_room_for(self, num_slots: int) -> bool:
        """Whether `admit` would find the pages."""
        return all(pool.pages_for(num_slots) <= pool.num_free_pages for pool in self.pools)

    def admit(self, sequence: int, num_slots: int) -> None:
        """Allots all pages of an empty sequence that will need no more than `num_slots` slots."""
        for pool in self.pools:
            pool.allot(sequence, num_slots)

    def release(self, sequence: int) -> None:
        """Forgets a sequence; its pages are free."""
        for pool in self.pools:
            pool.release(sequence)
        self.lengths[sequence] = 0

    def move(self, source: int, target: int) -> None:
        """Sequence `source` becomes number `target`, which had been released."""
        for pool in self.pools:
            pool.move(source, target)
        self.lengths[target], self.lengths[source] = self.lengths[source], 0

    def causal_step(self, *counts: int) -> Step:
        """A step of `counts[b]` consecutive rows of each sequence b: a prompt, a token, a chain."""
        lengths, counts = self._reserve(counts), tuple(counts)
        positions = [range(n, n + new) for n, new in zip(lengths, counts, strict=True)]
        return self._step(counts, self._integers(chain.from_iterable(positions)), positions, None)

    def tree_step(self, *trees: Tree) -> Step:
        """A step of one tree per sequence, at most 64 rows each; positions go by depth.

        Several rows without a parent are a forest, as a draft's first level is.
        """
        counts = tuple(len(tree.parents) for tree in trees)
        if max(counts) > MAX_TREE_ROWS:
            raise ValueError(f"trees: at most {MAX_TREE_ROWS} rows per sequence, got {max(counts)}")
        lengths = self._reserve(counts)
        slots = [range(n, n + new) for n, new in zip(lengths, counts, strict=True)]
        positions = [n + d for n, tree in zip(lengths, trees, strict=True) for d in tree.depths()]
        words = self._integers(word for tree in trees for word in tree.ancestor_words())
        return self._step(counts, self._integers(positions), slots, words)

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Keeps the rows `path` (ascending, from the root) of the last step; forgets the others."""
        length, rows = self.lengths[sequence], self._step_rows[sequence]
        if list(path) != sorted(set(path)) or not set(path) <= set(range(rows)):
            raise ValueError(
                f"path: must be ascending rows 0..{rows - 1} of the last step, got {list(path)}"
            )
        if list(path) != list(range(len(path))):
            sources, targets = [length + row for row in path], range(length, length + len(path))
            for pool in self.pools:
                slots = (pool.slots(sequence, logical) for logical in (sources, targets))
                self.move_slots(pool.k_LRCGK, pool.v_LRCGK, *map(self._integers, slots))
        self.lengths[sequence] = length + len(path)
        self._step_rows[sequence] = 0

    def rollback(self, sequence: int, length: int) -> None:
        """Forgets everything from position `length` on.

        Raises ValueError if the chunked layers no longer hold what a row at `length` sees.
        """
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"length: must be 0..{self.lengths[sequence]}, got {length}")
        for ring in self._rings:
            ring.check_rollback(sequence, length)
        for ring in self._rings:
            ring.rollback(sequence, length)
        self.lengths[sequence] = length

    def _reserve(self, counts: Sequence[int]) -> list[int]:
        if len(counts) != len(self.lengths):
            raise ValueError(f"counts: one per sequence ({len(self.lengths)}), got {len(counts)}")
        for sequence, (length, new) in enumerate(zip(self.lengths, counts, strict=True)):
            if length + new > self.max_length:
                raise ValueError(
                    f"sequence {sequence}: {length} cached and {new} new rows do not fit in "
                    f"max_length {self.max_length}; allocate a longer cache"
                )
            if self._rings and new > self.max_step_rows:
                raise ValueError(
                    f"sequence {sequence}: {new} rows in one step, but the chunked layers have "
                    f"room for {self.max_step_rows}; take several steps, or allocate the cache "
                    f"with max_step_rows={new}"
                )
        for ring in self._rings:
            for sequence, (length, new) in enumerate(zip(self.lengths, counts, strict=True)):
                ring.overwrite(sequence, length + new)
        return self.lengths

    def _step(
        self,
        counts: tuple[int, ...],
        positions_T: Tensor,
        slots: Sequence[Iterable[int]],
        ancestors_T: Tensor | None,
    ) -> Step:
        self._step_rows = list(counts)
        starts = [sum(counts[:sequence]) for sequence in range(len(counts) + 1)]
        rows = TreeRows(
            positions_T=positions_T,
            row_starts_B1=self._integers(starts, torch.int32),
            prefix_lengths_B=self._integers(self.lengths, torch.int32),
            page_table_BM=self.pools[0].page_table_BM,
            ancestors_T=ancestors_T,
            max_rows=max(counts),
        )
        placements = [Placement(rows, self._flat_slots(self.pools[0], slots))]
        for pool in self.pools[1:]:
            own_rows = replace(rows, page_table_BM=pool.page_table_BM)
            placements.append(Placement(own_rows, self._flat_slots(pool, slots)))
        return Step(tuple(placements), self)

    def _flat_slots(self, pool: KVPool, logical: Sequence[Iterable[int]]) -> Tensor:
        flat = [pool.slots(sequence, slots) for sequence, slots in enumerate(logical)]
        return self._integers(chain.from_iterable(flat))

    def _integers(self, values: Iterable[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self._device)


def _layers(pools: Sequence[KVPool], kv_scales: Sequence[KVScales]) -> list[LayerKV]:
    layers: dict[int, LayerKV] = {}
    for index, pool in enumerate(pools):
        keys_and_values = zip(pool.k_LRCGK.unbind(0), pool.v_LRCGK.unbind(0), strict=True)
        for layer, (k_RCGK, v_RCGK) in zip(pool.plan.layers, keys_and_values, strict=True):
            if k_RCGK.dtype == FP8:
                scales = kv_scales[layer].to(k_RCGK.device)
                layers[layer] = LayerKV(index, k_RCGK, v_RCGK, scales.k_scale, scales.v_scale)
            else:
                layers[layer] = LayerKV(index, k_RCGK, v_RCGK, None, None)
    return [layers[layer] for layer in range(len(layers))]
