"""The pages of layers that are stored alike, and the table that says where a slot lies in them."""

from collections.abc import Iterable

import torch

from aerie.llama4.kv_plan import PoolPlan


class KVPool:
    """Keys and values `[L, R, C, G, K]`; `page_table_BM[b, m]` holds slots m*C.. of sequence b.

    The table is static, so that a captured graph may keep it: a ring's row repeats its pages.
    """

    def __init__(
        self,
        plan: PoolPlan,
        num_sequences: int,
        row_shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """`row_shape` is (C, G, K). Raises ValueError where the memory does not suffice."""
        self.plan = plan
        shape = (len(plan.layers), num_sequences * plan.num_pages, *row_shape)
        try:
            self.k_LRCGK = torch.zeros(shape, dtype=dtype, device=device)
            self.v_LRCGK = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # both allocators raise it when memory is short
            raise ValueError(
                f"max_length: a cache of {shape} x 2 does not fit ({error})"
            ) from error
        self.use_pages(
            [
                [
                    sequence * plan.num_pages + m % plan.num_pages
                    for m in range(plan.num_logical_pages)
                ]
                for sequence in range(num_sequences)
            ]
        )
        self.page_size = row_shape[0]
        self._oldest = [0] * num_sequences  # of a ring: slots below are overwritten

    def use_pages(self, pages: list[list[int]]) -> None:
        """Sets the table: on the device for attention, and on the host, which places the rows."""
        self._pages = pages
        self.page_table_BM = torch.tensor(pages, dtype=torch.int32, device=self.k_LRCGK.device)

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
