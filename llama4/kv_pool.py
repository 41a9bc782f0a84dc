"""The pages of layers that are stored alike, and the table that says where a slot lies in them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from aerie.llama4.kv_plan import PoolPlan
from aerie.llama4.upload import upload


class KVPool:
    """Keys and values `[L, R, C, G, K]`; `page_table_BM[b, m]` holds slots m*C.. of sequence b.

    `slots_BS` is the table spelled out, the flat slot (page * C + offset) of every logical one, so
    that a step finds its slots in one gather; -1 where a sequence has no page. A ring's row repeats
    its pages. Both are written in place, so that a captured graph may keep them.
    """

    def __init__(
        self,
        plan: PoolPlan,
        num_sequences: int,
        num_pages: int,
        row_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """`row_shape` is (C, G, K). Raises ValueError where the memory does not suffice."""
        self.plan = plan
        self.page_size = row_shape[0]
        self.num_pages = num_pages
        shape = (len(plan.layers), num_pages, *row_shape)
        columns = plan.num_logical_pages
        try:
            self.k_LRCGK = torch.zeros(shape, dtype=dtype, device=device)
            self.v_LRCGK = torch.zeros(shape, dtype=dtype, device=device)
            self.page_table_BM = torch.zeros(
                num_sequences, columns, dtype=torch.int32, device=device
            )
            self.slots_BS = torch.full(
                (num_sequences, columns * self.page_size), -1, dtype=torch.int64, device=device
            )
        except RuntimeError as error:  # both allocators raise it when memory is short
            raise ValueError(
                f"max_length: a cache of {shape} x 2 does not fit ({error})"
            ) from error
        self._free = list(range(num_pages))  # ascending
        self._pages: list[list[int]] = [[] for _ in range(num_sequences)]  # logical
        self._oldest = [0] * num_sequences  # of a ring: slots below are overwritten

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that the pool has allocated."""
        return self.k_LRCGK, self.v_LRCGK, self.page_table_BM, self.slots_BS

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def pages_for(self, num_slots: int) -> int:
        """Pages of a sequence of `num_slots` slots: those of a whole ring at most."""
        return min(-(-num_slots // self.page_size), self.plan.num_pages)

    def allot(self, sequence: int, num_slots: int) -> None:
        """Gives a sequence without pages those it needs; the caller has checked that they exist."""
        pages = self._take(self.pages_for(num_slots))
        is_ring = len(pages) == self.plan.num_pages
        columns = self.plan.num_logical_pages if is_ring else len(pages)
        self._set(sequence, [pages[m % len(pages)] for m in range(columns)])

    def release(self, sequence: int) -> None:
        """Takes a sequence's pages back."""
        self._free = sorted({*self._free, *self._pages[sequence]})
        self._clear(sequence)

    def move(self, source: int, target: int) -> None:
        """Row `source` becomes row `target`, which had no pages; keys and values stay in place."""
        self._pages[target], self._oldest[target] = self._pages[source], self._oldest[source]
        self.page_table_BM[target] = self.page_table_BM[source]
        self.slots_BS[target] = self.slots_BS[source]
        self._clear(source)

    def use_pages(self, pages: Sequence[list[int]]) -> None:
        """Sets every row of the table; no page is free afterwards."""
        self._free = []
        for sequence, own in enumerate(pages):
            self._set(sequence, own)

    def slots(self, sequence: int, logical: Iterable[int]) -> list[int]:
        """Physical slots (page * C + offset) of a sequence's logical slots.

        On the host: a handful of integers is quicker there than in any tensor.
        """
        pages, size = self._pages[sequence], self.page_size
        return [pages[slot // size] * size + slot % size for slot in logical]

    def overwrite(self, sequence: int, end: int) -> None:
        """Of a ring: a step writes up to slot `end`, over what lies one turn before."""
        oldest = end - self.plan.num_pages * self.page_size
        self._oldest[sequence] = max(self._oldest[sequence], oldest)

    def check_rollback(self, sequence: int, length: int) -> None:
        """Of a ring: raises ValueError if rows at `length` would see overwritten slots."""
        chunk_size, oldest = self.plan.chunk_size, self._oldest[sequence]
        assert chunk_size is not None
        first = length - length % chunk_size
        if first < min(oldest, length):
            raise ValueError(
                f"length: {length} needs slots from {first} on, but the chunked layers "
                f"keep those from {oldest} on; roll back to a position whose chunk begins there or "
                f"later, or to a multiple of {chunk_size}, and decode from it again"
            )

    def rollback(self, sequence: int, length: int) -> None:
        """Of a ring, after the check: an empty chunk at `length` needs nothing older."""
        self._oldest[sequence] = min(self._oldest[sequence], length)

    def _take(self, count: int) -> list[int]:
        """The first `count` free pages side by side, which a reference reads without a gather, or
        else the first ones."""
        free = self._free
        starts = range(len(free) - count + 1)
        first = next((i for i in starts if free[i + count - 1] - free[i] == count - 1), 0)
        taken = free[first : first + count]
        assert len(taken) == count, "pages must be free before they are allotted"
        self._free = free[:first] + free[first + count :]
        return taken

    def _set(self, sequence: int, pages: list[int]) -> None:
        self._pages[sequence] = pages
        pages_M = upload(pages, torch.int32, self.k_LRCGK.device)
        self.page_table_BM[sequence, : len(pages)] = pages_M
        offsets_C = torch.arange(self.page_size, device=pages_M.device)
        slots_MC = pages_M.long()[:, None] * self.page_size + offsets_C
        self.slots_BS[sequence, : slots_MC.numel()] = slots_MC.flatten()

    def _clear(self, sequence: int) -> None:
        self._pages[sequence], self._oldest[sequence] = [], 0
        self.page_table_BM[sequence] = 0
        self.slots_BS[sequence] = -1


def rows_of(table: Tensor, first: int, count: int) -> Tensor:
    """Rows `first` .. of a table; the table itself where that is all of it."""
    return table if count == table.shape[0] else table[first : first + count]
