"""What temperature, top-k, top-p and min-p are for every sequence, and its seed: on the device."""

import torch
from torch import Tensor

from aerie.eagle3.choice_form import ChoiceForm
from aerie.eagle3.sampling import SamplingParams
from aerie.llama4.kv_pool import rows_of


class FilterColumns:
    """The numbers of `SamplingParams`, one row per sequence; temperature 0 is greedy."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(capacity, dtype=dtype, device=device)

        self._temperature_B, self._top_p_B, self._min_p_B = (column(torch.float32) for _ in "123")
        self._top_k_B, self._seeds_B = column(torch.int64), column(torch.int64)

    def join(self, row: int, params: SamplingParams, seed: int) -> None:
        self._temperature_B[row] = 0.0 if params.is_greedy else params.temperature
        self._top_k_B[row] = params.top_k
        self._top_p_B[row] = params.top_p
        self._min_p_B[row] = params.min_p
        self._seeds_B[row] = seed

    def move(self, source: int, target: int) -> None:
        for column_B in vars(self).values():
            column_B[target] = column_B[source]

    def temperatures(self, first: int, sequences: int) -> Tensor:
        return rows_of(self._temperature_B, first, sequences)

    def seeds(self, first: int, sequences: int) -> Tensor:
        return rows_of(self._seeds_B, first, sequences)

    def of_rows(
        self, first: int, sequences: int, rows: int, form: ChoiceForm
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Temperature, top-k, top-p and min-p of `rows` rows of every sequence.

        A filter that `form` leaves out is None; where it is off for a sequence, its number says so.
        """

        def of(column_B: Tensor) -> Tensor:
            return rows_of(column_B, first, sequences).repeat_interleave(rows)

        return (
            of(self._temperature_B),
            of(self._top_k_B) if form.has_top_k else None,
            of(self._top_p_B) if form.has_top_p else None,
            of(self._min_p_B) if form.has_min_p else None,
        )
