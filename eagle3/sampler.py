"""From the logits of a pass to the target's own token at every row.

The choice at a row depends on its logits, its prefix, the seed and its position, never on the
tree, the batch or the pass (draw-and-match, contract 7.1): so the text is the same with and
without a draft, whatever the draft proposes.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from aerie.eagle3.logits_rules import rules_of
from aerie.eagle3.prefixes import History, Prefixes
from aerie.eagle3.sampling import SamplingParams
from aerie.kernels.argmax import argmax, argmax_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.draw import draw, draw_ref
from aerie.kernels.row_filter import row_filter, row_filter_ref


class Sampler:
    """Chooses for one sequence, whose tokens it is told."""

    def __init__(
        self,
        params: SamplingParams,
        history: History,
        end_ids: Iterable[int],
        vocab_size: int,
        backend: ResolvedBackend,
        device: torch.device,
    ) -> None:
        """`end_ids` are what min_tokens holds back; `params.seed` None is drawn here."""
        self.params = params
        is_seeded = params.is_greedy or params.seed is not None
        self.seed = params.seed if is_seeded else int(torch.randint(2**63 - 1, ()))
        self._history = history
        self._device = device
        self._rules = rules_of(params, end_ids, vocab_size, device)
        self._argmax = pick(backend, argmax, argmax_ref)
        self._row_filter = pick(backend, row_filter, row_filter_ref)
        self._draw = pick(backend, draw, draw_ref)

    def observe(self, tokens: Sequence[int]) -> None:
        """Tokens that have become part of the sequence."""
        if self._rules:
            self._history.extend(tokens)

    def choose(
        self, logits_TV: Tensor, tokens_T: Tensor, parents_T: Tensor, positions_T: Tensor
    ) -> Tensor:
        """The target's token behind each row, int64; -1 where the logits allow none.

        Row 0 is the last known token, `positions_T` are those of the rows.
        """
        if self._rules:
            known_S, num_prompt = self._history.ids_S, self._history.num_prompt
            prefixes = Prefixes(known_S, num_prompt, tokens_T, parents_T, positions_T)
            logits_TV = logits_TV.float()
            for rule in self._rules:
                logits_TV = rule(logits_TV, prefixes)
        if self.params.is_greedy:
            return self._argmax(logits_TV)
        return self._drawn(logits_TV, positions_T + 1)

    def _drawn(self, logits_TV: Tensor, positions_T: Tensor) -> Tensor:
        params, rows = self.params, len(logits_TV)

        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=self._device)

        kept = self._row_filter(
            logits_TV,
            column(params.temperature),
            column(params.top_k, torch.int64) if params.top_k > 0 else None,
            column(params.top_p) if params.top_p < 1 else None,
            column(params.min_p) if params.min_p > 0 else None,
        )
        return self._draw(logits_TV, kept, column(self.seed or 0, torch.int64), positions_T)
