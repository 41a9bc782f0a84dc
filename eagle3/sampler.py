"""From the logits of a pass to the target's own token at every row.

The choice at a row depends on its logits, its prefix, the seed and its position, never on the
tree, the batch or the pass (draw-and-match, contract 7.1): so the text is the same with and
without a draft, whatever the draft proposes and whoever runs beside.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.logits_rules import Rule, rules_of
from aerie.eagle3.prefixes import Prefixes
from aerie.eagle3.sampling import SamplingParams
from aerie.kernels.argmax import argmax, argmax_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.draw import draw, draw_ref
from aerie.kernels.row_filter import row_filter, row_filter_ref
from aerie.llama4.cache import DeviceTree
from aerie.llama4.kv_pool import rows_of

GREEDY = SamplingParams()


@dataclass(frozen=True)
class ChoiceRows:
    """Rows to choose behind: N of each of B sequences, from number `first` of the batch on.

    Row 0 of a sequence is its root, which `lengths_B` tokens precede.
    """

    first: int
    lengths_B: Tensor
    tokens_BN: Tensor
    shape: DeviceTree
    positions_T: Tensor  # of the rows, not of the tokens to be chosen


@dataclass(frozen=True)
class _Request:
    params: SamplingParams
    rules: list[Rule]
    num_prompt: int


class Sampler:
    """Chooses for the sequences of a batch, each by its own parameters; `ids_BS` are its tokens."""

    def __init__(
        self, ids_BS: Tensor, vocab_size: int, backend: ResolvedBackend, device: torch.device
    ) -> None:
        capacity = len(ids_BS)
        self._ids_BS, self._vocab_size, self._device = ids_BS, vocab_size, device
        self._requests = [_Request(GREEDY, [], 0)] * capacity
        self._columns = _Columns.zeros(capacity, device)
        self._argmax = pick(backend, argmax, argmax_ref)
        self._row_filter = pick(backend, row_filter, row_filter_ref)
        self._draw = pick(backend, draw, draw_ref)

    def join(
        self, row: int, params: SamplingParams, seed: int, end_ids: Iterable[int], num_prompt: int
    ) -> None:
        """Sequence `row` follows `params` from now on; `end_ids` are what min_tokens holds back."""
        rules = rules_of(params, end_ids, self._vocab_size, self._device)
        self._requests[row] = _Request(params, rules, num_prompt)
        self._columns.set(row, params, seed)

    def move(self, source: int, target: int) -> None:
        self._requests[target] = self._requests[source]
        self._columns.move(source, target)

    def needs_ids(self, sequences: int) -> bool:
        """Whether any of the first `sequences` is judged by its prefix."""
        return any(request.rules for request in self._requests[:sequences])

    def choose(self, logits_TV: Tensor, rows: ChoiceRows) -> Tensor:
        """The target's token behind each row, int64 [T]; -1 where the logits allow none."""
        requests = self._requests[rows.first : rows.first + len(rows.tokens_BN)]
        if any(request.rules for request in requests):
            logits_TV = self._ruled(logits_TV.float(), rows, requests)
        if all(request.params.is_greedy for request in requests):
            return self._argmax(logits_TV)
        return self._drawn(logits_TV, rows.positions_T + 1, rows.first, requests)

    def _ruled(self, logits_TV: Tensor, rows: ChoiceRows, requests: list[_Request]) -> Tensor:
        count, parts = rows.tokens_BN.shape[1], logits_TV.split(rows.tokens_BN.shape[1])
        ruled, shape = list(parts), rows.shape
        own = lambda values_N, b: values_N if values_N.ndim == 1 else values_N[b]  # noqa: E731
        for b, request in enumerate(requests):
            if not request.rules:
                continue
            prefixes = Prefixes(
                self._ids_BS[rows.first + b],
                rows.lengths_B[b] + 1,
                request.num_prompt,
                rows.tokens_BN[b],
                own(shape.parents_N, b),
                own(shape.depths_N, b),
            )
            for rule in request.rules:
                ruled[b] = rule(ruled[b], prefixes)
        assert all(len(part) == count for part in ruled)
        return torch.cat(ruled)

    def _drawn(
        self, logits_TV: Tensor, positions_T: Tensor, first: int, requests: list[_Request]
    ) -> Tensor:
        """A filter that no sequence asks for is left out; for others its column says off."""
        sequences, columns = len(requests), self._columns
        rows = len(logits_TV) // sequences

        def of_rows(column_B: Tensor) -> Tensor:
            return rows_of(column_B, first, sequences).repeat_interleave(rows)

        def if_any(is_on: Callable[[SamplingParams], bool], column_B: Tensor) -> Tensor | None:
            return of_rows(column_B) if any(is_on(r.params) for r in requests) else None

        kept = self._row_filter(
            logits_TV,
            of_rows(columns.temperature_B),
            if_any(lambda params: params.top_k > 0, columns.top_k_B),
            if_any(lambda params: params.top_p < 1, columns.top_p_B),
            if_any(lambda params: params.min_p > 0, columns.min_p_B),
        )
        return self._draw(logits_TV, kept, of_rows(columns.seeds_B), positions_T)


@dataclass(frozen=True)
class _Columns:
    """The numbers of `SamplingParams`, one row per sequence."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seeds_B: Tensor

    @classmethod
    def zeros(cls, capacity: int, device: torch.device) -> "_Columns":
        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(capacity, dtype=dtype, device=device)

        real, whole = torch.float32, torch.int64
        return cls(column(real), column(whole), column(real), column(real), column(whole))

    def set(self, row: int, params: SamplingParams, seed: int) -> None:
        self.temperature_B[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k_B[row] = params.top_k
        self.top_p_B[row] = params.top_p
        self.min_p_B[row] = params.min_p
        self.seeds_B[row] = seed

    def move(self, source: int, target: int) -> None:
        for name in self.__dataclass_fields__:
            column_B = getattr(self, name)
            column_B[target] = column_B[source]
