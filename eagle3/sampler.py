"""From the logits of a pass to the target's own token at every row.

The choice at a row depends on its logits, its prefix, the seed and its position, never on the
tree, the batch or the pass (draw-and-match, contract 7.1): so the text is the same with and
without a draft, whatever the draft proposes and whoever runs beside.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from aerie.eagle3.logits_rules import Rule, rules_of
from aerie.eagle3.noise import coins
from aerie.eagle3.prefixes import Prefixes
from aerie.eagle3.rejection import Drawn, walk
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sharded_choice import ShardedChoice
from aerie.kernels.argmax import argmax, argmax_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.draw import draw, draw_ref
from aerie.kernels.row_filter import RowFilter, row_filter, row_filter_ref
from aerie.kernels.target_probs import target_probs, target_probs_ref
from aerie.llama4.cache import DeviceTree
from aerie.llama4.communicator import Communicator, shard_of
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
        self,
        ids_BS: Tensor,
        vocab_size: int,
        backend: ResolvedBackend,
        device: torch.device,
        communicator: Communicator | None = None,
    ) -> None:
        """With a `communicator` the logits are this rank's columns, and all ranks choose alike."""
        capacity = len(ids_BS)
        self._ids_BS, self._device = ids_BS, device
        part = shard_of(communicator).part(vocab_size)
        self._own_ids, self._sharded = range(part.start, part.stop), None
        if communicator is not None:
            self._sharded = ShardedChoice(communicator, vocab_size, backend)
        self._requests = [_Request(GREEDY, [], 0)] * capacity
        self._columns = _Columns.zeros(capacity, device)
        self._argmax = pick(backend, argmax, argmax_ref)
        self._row_filter = pick(backend, row_filter, row_filter_ref)
        self._draw = pick(backend, draw, draw_ref)
        self._target_probs = pick(backend, target_probs, target_probs_ref)

    def join(
        self, row: int, params: SamplingParams, seed: int, end_ids: Iterable[int], num_prompt: int
    ) -> None:
        """Sequence `row` follows `params` from now on; `end_ids` are what min_tokens holds back."""
        rules = rules_of(params, end_ids, self._own_ids, self._device)
        self._requests[row] = _Request(params, rules, num_prompt)
        self._columns.set(row, params, seed)

    def move(self, source: int, target: int) -> None:
        self._requests[target] = self._requests[source]
        self._columns.move(source, target)

    def is_greedy(self, sequences: int) -> bool:
        """Whether none of the first `sequences` is sampled."""
        return all(request.params.is_greedy for request in self._requests[:sequences])

    @contextmanager
    def all_rows_as(self, params: SamplingParams) -> Iterator[None]:
        """The operations that `params` take, for all rows; the numbers stay the columns'."""
        requests = self._requests
        self._requests = [_Request(params, [], 0)] * len(requests)
        yield
        self._requests = requests

    @property
    def is_cut(self) -> bool:
        """Whether the target's vocabulary is cut over ranks."""
        return self._sharded is not None

    def needs_ids(self, sequences: int) -> bool:
        """Whether any of the first `sequences` is judged by its prefix."""
        return any(request.rules for request in self._requests[:sequences])

    def choose(
        self, logits_TV: Tensor, rows: ChoiceRows, drawn: Drawn | None = None, depth: int = 0
    ) -> Tensor:
        """The target's token behind each row, int64 [T]; -1 where the logits allow none.

        Of trees that were `drawn`, of `depth` levels, the tokens behind the rows that rejection
        accepts: what is emitted is distributed as the target's own choice, and is not the same.
        """
        requests = self._requests[rows.first : rows.first + len(rows.tokens_BN)]
        if any(request.rules for request in requests):
            logits_TV = self._ruled(logits_TV.float(), rows, requests)
        if self._sharded is not None:
            return self._from_columns(self._sharded, logits_TV, rows, requests)
        if all(request.params.is_greedy for request in requests):
            return self._argmax(logits_TV)
        kept = self._kept(logits_TV, rows.first, requests)
        if drawn is not None:
            return self._accepted(logits_TV, kept, rows, drawn, depth)
        seeds_B = rows_of(self._columns.seeds_B, rows.first, len(requests))
        return self._drawn(logits_TV, rows.positions_T + 1, kept, seeds_B)

    def _drawn(
        self, logits_TV: Tensor, positions_T: Tensor, kept: RowFilter, seeds_B: Tensor
    ) -> Tensor:
        seeds_T = seeds_B.repeat_interleave(len(logits_TV) // len(seeds_B))
        return self._draw(logits_TV, kept, seeds_T, positions_T)

    def _accepted(
        self, logits_TV: Tensor, kept: RowFilter, rows: ChoiceRows, drawn: Drawn, depth: int
    ) -> Tensor:
        (sequences, count), vocabulary = rows.tokens_BN.shape, logits_TV.shape[1]
        first_B = torch.arange(0, sequences * count, count, device=self._device)
        ids_V = torch.arange(vocabulary, device=self._device).expand(sequences, -1)
        seeds_B = rows_of(self._columns.seeds_B, rows.first, sequences)
        positions_BN = rows.positions_T.view(sequences, count)

        def p_of_rows(row_B: Tensor) -> Tensor:
            at_B = first_B + row_B
            own = RowFilter(*(getattr(kept, field.name)[at_B] for field in fields(RowFilter)))
            return self._target_probs(logits_TV[at_B], ids_V, own)

        def pick(left_BV: Tensor, level_B: Tensor) -> Tensor:
            log_BV = left_BV.log()
            all_kept = self._row_filter(log_BV, torch.ones_like(log_BV[:, 0]))
            return self._draw(log_BV, all_kept, seeds_B, positions_BN[:, 0] + level_B)

        coins_BN = coins(seeds_B, positions_BN, drawn.ranks_N)
        return walk(p_of_rows, rows.tokens_BN, drawn, coins_BN, pick, depth).view(-1)

    def temperatures_and_seeds(self, sequences: int) -> tuple[Tensor, Tensor]:
        """Of the first `sequences`; temperature 0 is greedy."""
        columns = self._columns
        return rows_of(columns.temperature_B, 0, sequences), rows_of(columns.seeds_B, 0, sequences)

    def _ruled(self, logits_TV: Tensor, rows: ChoiceRows, requests: list[_Request]) -> Tensor:
        count, parts = rows.tokens_BN.shape[1], logits_TV.split(rows.tokens_BN.shape[1])
        ruled, shape = list(parts), rows.shape
        for b, request in enumerate(requests):
            if not request.rules:
                continue
            prefixes = Prefixes(
                self._ids_BS[rows.first + b],
                rows.lengths_B[b] + 1,
                request.num_prompt,
                rows.tokens_BN[b],
                _of_sequence(shape.parents_N, b),
                _of_sequence(shape.depths_N, b),
            )
            for rule in request.rules:
                ruled[b] = rule(ruled[b], prefixes)
        assert all(len(part) == count for part in ruled)
        return torch.cat(ruled)

    def _from_columns(
        self,
        sharded: ShardedChoice,
        logits_TV: Tensor,
        rows: ChoiceRows,
        requests: list[_Request],
    ) -> Tensor:
        if all(request.params.is_greedy for request in requests):
            return sharded.greedy(logits_TV)
        seeds_B = rows_of(self._columns.seeds_B, rows.first, len(requests))
        seeds_T = seeds_B.repeat_interleave(rows.tokens_BN.shape[1])
        filters = self._filters(len(logits_TV), rows.first, requests)
        return sharded.drawn(logits_TV, seeds_T, rows.positions_T + 1, *filters)

    def _kept(self, logits_TV: Tensor, first: int, requests: list[_Request]) -> RowFilter:
        return self._row_filter(logits_TV, *self._filters(len(logits_TV), first, requests))

    def _filters(
        self, num_rows: int, first: int, requests: list[_Request]
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Temperature, top-k, top-p and min-p of every row.

        A filter that no sequence asks for is left out; for others its column says off.
        """
        sequences, columns = len(requests), self._columns
        rows = num_rows // sequences

        def of_rows(column_B: Tensor) -> Tensor:
            return rows_of(column_B, first, sequences).repeat_interleave(rows)

        def if_any(is_on: Callable[[SamplingParams], bool], column_B: Tensor) -> Tensor | None:
            return of_rows(column_B) if any(is_on(r.params) for r in requests) else None

        return (
            of_rows(columns.temperature_B),
            if_any(lambda params: params.top_k > 0, columns.top_k_B),
            if_any(lambda params: params.top_p < 1, columns.top_p_B),
            if_any(lambda params: params.min_p > 0, columns.min_p_B),
        )


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


def _of_sequence(values_N: Tensor, sequence: int) -> Tensor:
    """Sequence's row of [B, N]; [N] is the same for all of them."""
    return values_N if values_N.ndim == 1 else values_N[sequence]
