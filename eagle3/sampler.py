"""From the logits of a pass to the target's own token at every row.

The choice at a row depends on its logits, its prefix, the seed and its position, never on the
tree, the batch or the pass (draw-and-match): so the text is the same with and without a draft,
whatever the draft proposes and whoever runs beside.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from aerie.eagle3.choice_form import GREEDY, ChoiceForm, common_form
from aerie.eagle3.filter_columns import FilterColumns
from aerie.eagle3.logits_processors import processed
from aerie.eagle3.logits_rules import RuleColumns
from aerie.eagle3.noise import coins
from aerie.eagle3.prefixes import Prefixes
from aerie.eagle3.rejection import Drawn, walk
from aerie.eagle3.sampling import LogitsProcessor, SamplingParams
from aerie.eagle3.sharded_choice import ShardedChoice
from aerie.kernels.argmax import argmax, argmax_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.draw import draw, draw_ref
from aerie.kernels.row_filter import RowFilter, row_filter, row_filter_ref
from aerie.kernels.target_probs import target_probs, target_probs_ref
from aerie.llama4.communicator import Communicator, shard_of
from aerie.llama4.kv_pool import rows_of
from aerie.llama4.step import DeviceTree


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
    form: ChoiceForm = GREEDY
    processors: Sequence[LogitsProcessor] = ()


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
        self._requests = [_Request()] * capacity
        self._filters = FilterColumns(capacity, device)
        self.rules = RuleColumns(capacity, self._own_ids, device)
        self._fixed: ChoiceForm | None = None
        self._forms: dict[tuple[int, int], ChoiceForm] = {}  # of the requests as they stand
        self._argmax = pick(backend, argmax, argmax_ref)
        self._row_filter = pick(backend, row_filter, row_filter_ref)
        self._draw = pick(backend, draw, draw_ref)
        self._target_probs = pick(backend, target_probs, target_probs_ref)

    def join(
        self, row: int, params: SamplingParams, seed: int, end_ids: Iterable[int], num_prompt: int
    ) -> None:
        """Sequence `row` follows `params` from now on; `end_ids` are what min_tokens holds back."""
        ends = list(end_ids)
        form = ChoiceForm.of(params, ends)
        self._requests[row] = _Request(form, params.logits_processors)
        self._forms.clear()
        self._filters.join(row, params, seed)
        self.rules.join(row, params, ends, num_prompt)

    def move(self, source: int, target: int) -> None:
        self._requests[target] = self._requests[source]
        self._forms.clear()
        self._filters.move(source, target)
        self.rules.move(source, target)

    def form(self, sequences: int, first: int = 0) -> ChoiceForm:
        """How `sequences` from row `first` on are chosen for."""
        if self._fixed is not None:
            return self._fixed
        if (sequences, first) not in self._forms:
            own = self._requests[first : first + sequences]
            self._forms[sequences, first] = common_form(request.form for request in own)
        return self._forms[sequences, first]

    def has_processors(self, sequences: int) -> bool:
        """Whether any of the first `sequences` is judged by Python on the host."""
        return any(request.processors for request in self._requests[:sequences])

    @contextmanager
    def all_rows_as(self, form: ChoiceForm) -> Iterator[None]:
        """Chooses for every row in this form, whatever is asked; the numbers stay the tables'."""
        self._fixed = form
        yield
        self._fixed = None

    @property
    def is_cut(self) -> bool:
        """Whether the target's vocabulary is cut over ranks."""
        return self._sharded is not None

    def needs_ids(self, sequences: int) -> bool:
        """Whether any of the first `sequences` is judged by its prefix."""
        return bool(self.form(sequences).rules) or self.has_processors(sequences)

    def choose(
        self, logits_TV: Tensor, rows: ChoiceRows, drawn: Drawn | None = None, depth: int = 0
    ) -> Tensor:
        """The target's token behind each row, int64 [T]; -1 where the logits allow none.

        Of trees that were `drawn`, of `depth` levels, the tokens behind the rows that rejection
        accepts: what is emitted is distributed as the target's own choice, and is not the same.
        """
        sequences, count = rows.tokens_BN.shape
        form = self.form(sequences, rows.first)
        requests = self._requests[rows.first : rows.first + sequences]
        if form.rules or any(request.processors for request in requests):
            logits_TV = self._judged(logits_TV.float(), rows, requests, form)
        if self._sharded is not None:
            return self._from_columns(self._sharded, logits_TV, rows, form)
        if form.is_greedy:
            return self._argmax(logits_TV)
        filters = self._filters.of_rows(rows.first, sequences, count, form)
        kept = self._row_filter(logits_TV, *filters)
        if drawn is not None:
            return self._accepted(logits_TV, kept, rows, drawn, depth)
        seeds_B = self._filters.seeds(rows.first, sequences)
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
        seeds_B = self._filters.seeds(rows.first, sequences)
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
        return self._filters.temperatures(0, sequences), self._filters.seeds(0, sequences)

    def _judged(
        self, logits_TV: Tensor, rows: ChoiceRows, requests: list[_Request], form: ChoiceForm
    ) -> Tensor:
        (sequences, count), shape = rows.tokens_BN.shape, rows.shape

        def of_all(values_N: Tensor) -> Tensor:
            return values_N.expand(sequences, count)

        prefixes = Prefixes(
            rows_of(self._ids_BS, rows.first, sequences),
            rows.lengths_B + 1,
            rows_of(self.rules.num_prompt_B, rows.first, sequences),
            rows.tokens_BN,
            of_all(shape.parents_N),
            of_all(shape.depths_N),
            None if shape.words_N is None else of_all(shape.words_N),
        )
        logits_BNV = logits_TV.view(sequences, count, -1)
        logits_BNV = self.rules.judged(logits_BNV, prefixes, rows.first, form.rules)
        if any(request.processors for request in requests):
            judged = list(logits_BNV.unbind())
            for b, request in enumerate(requests):
                for processor in request.processors:
                    judged[b] = processed(processor, judged[b], prefixes.of(b))
            logits_BNV = torch.stack(judged)
        return logits_BNV.flatten(0, 1)

    def _from_columns(
        self, sharded: ShardedChoice, logits_TV: Tensor, rows: ChoiceRows, form: ChoiceForm
    ) -> Tensor:
        if form.is_greedy:
            return sharded.greedy(logits_TV)
        sequences, count = rows.tokens_BN.shape
        seeds_T = self._filters.seeds(rows.first, sequences).repeat_interleave(count)
        filters = self._filters.of_rows(rows.first, sequences, count, form)
        return sharded.drawn(logits_TV, seeds_T, rows.positions_T + 1, *filters)
