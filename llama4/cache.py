"""A paged key/value cache with static allocation, used by the target and by the draft.

All layers share one page table per sequence. A step appends the keys and values of its rows behind
the committed length; what it appended counts only once `commit` says which rows were accepted, so a
rejected row needs no undo: the next step overwrites it.

    slots:    0 .. length-1         committed, one per position
              length .. length+n-1  rows of the running step, in row order (a tree's rows too)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.cache_commit import cache_commit, cache_commit_ref
from aerie.kernels.kv_append import kv_append, kv_append_ref
from aerie.kernels.tree_attention import TreeRows


@dataclass(frozen=True)
class Tree:
    """New rows of one sequence: row 0 is the root, whose parent is -1; `parents[i] < i`."""

    parents: tuple[int, ...]

    def depths(self) -> list[int]:
        """Edges between the root and each row."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def ancestor_words(self) -> list[int]:
        """One signed 64-bit word per row: bit j is set if row j is the row or an ancestor."""
        words: list[int] = []
        for row, parent in enumerate(self.parents):
            words.append((1 << row) | (words[parent] if parent >= 0 else 0))
        return [word - (1 << 64) if word >= 1 << 63 else word for word in words]


@dataclass(frozen=True)
class Step:
    """Where the T rows of one forward pass stand and where their keys and values go."""

    rows: TreeRows
    slots_T: Tensor
    cache: "PagedKVCache"


class PagedKVCache:
    """Keys and values `[L, R, C, G, K]`; `page_table_BM[b, m]` holds slots m*C.. of sequence b.

    `lengths[b]` is the committed length of sequence b, one slot per position. Pages are allotted at
    construction (`max_length` slots per sequence) and never move.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        *,
        num_sequences: int = 1,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: ResolvedBackend = "eager",
    ) -> None:
        pages_per_sequence = -(-max_length // page_size)
        num_pages = num_sequences * pages_per_sequence
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        try:
            self.k_LRCGK = torch.zeros(shape, dtype=dtype, device=device)
            self.v_LRCGK = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # both allocators raise it when memory is short
            raise ValueError(
                f"max_length: a cache of {shape} x 2 does not fit ({error})"
            ) from error
        self.k_RCGK = self.k_LRCGK.unbind(0)  # one view per layer
        self.v_RCGK = self.v_LRCGK.unbind(0)
        pages_R = torch.arange(num_pages, dtype=torch.int32, device=device)
        self.page_table_BM = pages_R.view(num_sequences, pages_per_sequence)
        self.lengths = [0] * num_sequences
        self.max_length = max_length
        self._step_rows = [0] * num_sequences  # what the last step appended
        self._kv_append = pick(backend, kv_append, kv_append_ref)
        self._cache_commit = pick(backend, cache_commit, cache_commit_ref)

    def causal_step(self, *counts: int) -> Step:
        """A step of `counts[b]` consecutive rows of each sequence b: a prompt, a token, a chain."""
        lengths, counts = self._reserve(counts), tuple(counts)
        positions = [torch.arange(n, n + new) for n, new in zip(lengths, counts, strict=True)]
        return self._step(counts, positions, positions, None)

    def tree_step(self, *trees: Tree) -> Step:
        """A step of one tree per sequence, at most 64 rows each; positions go by depth."""
        counts = tuple(len(tree.parents) for tree in trees)
        if max(counts) > 64:
            raise ValueError(f"trees: at most 64 rows per sequence, got {max(counts)}")
        lengths = self._reserve(counts)
        slots = [torch.arange(n, n + new) for n, new in zip(lengths, counts, strict=True)]
        depths = [torch.tensor(tree.depths()) for tree in trees]
        positions = [n + depth for n, depth in zip(lengths, depths, strict=True)]
        words = [word for tree in trees for word in tree.ancestor_words()]
        return self._step(counts, positions, slots, torch.tensor(words, dtype=torch.int64))

    def append(self, layer: int, k_TGK: Tensor, v_TGK: Tensor, slots_T: Tensor) -> None:
        """Writes the rows' keys and values of one layer."""
        self._kv_append(k_TGK, v_TGK, self.k_RCGK[layer], self.v_RCGK[layer], slots_T)

    def commit(self, sequence: int, path: Sequence[int]) -> None:
        """Keeps the rows `path` (ascending, from the root) of the last step; forgets the others."""
        length, rows = self.lengths[sequence], self._step_rows[sequence]
        if list(path) != sorted(set(path)) or not set(path) <= set(range(rows)):
            raise ValueError(
                f"path: must be ascending rows 0..{rows - 1} of the last step, got {list(path)}"
            )
        if list(path) != list(range(len(path))):
            sources_P = self._slots(sequence, length + torch.tensor(list(path)))
            targets_P = self._slots(sequence, length + torch.arange(len(path)))
            self._cache_commit(self.k_LRCGK, self.v_LRCGK, sources_P, targets_P)
        self.lengths[sequence] = length + len(path)
        self._step_rows[sequence] = 0

    def rollback(self, sequence: int, length: int) -> None:
        """Forgets everything from position `length` on."""
        if not 0 <= length <= self.lengths[sequence]:
            raise ValueError(f"length: must be 0..{self.lengths[sequence]}, got {length}")
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
        return self.lengths

    def _step(
        self,
        counts: tuple[int, ...],
        positions: list[Tensor],
        slots: list[Tensor],
        ancestors_T: Tensor | None,
    ) -> Step:
        device = self.k_LRCGK.device
        self._step_rows = list(counts)
        starts = [sum(counts[:sequence]) for sequence in range(len(counts) + 1)]
        rows = TreeRows(
            positions_T=torch.cat(positions).to(device),
            row_starts_B1=torch.tensor(starts, dtype=torch.int32, device=device),
            prefix_lengths_B=torch.tensor(self.lengths, dtype=torch.int32, device=device),
            page_table_BM=self.page_table_BM,
            ancestors_T=None if ancestors_T is None else ancestors_T.to(device),
            max_rows=max(counts),
        )
        slots_T = torch.cat([self._slots(b, logical) for b, logical in enumerate(slots)])
        return Step(rows, slots_T, self)

    def _slots(self, sequence: int, logical: Tensor) -> Tensor:
        """Physical slots (page * C + offset) of a sequence's logical slots."""
        logical = logical.to(self.page_table_BM.device)
        page_size = self.k_LRCGK.shape[2]
        pages = self.page_table_BM[sequence].index_select(0, logical // page_size)
        return torch.add(logical % page_size, pages, alpha=page_size)
