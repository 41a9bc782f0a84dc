"""Verification: one target pass over the root and the drafted nodes, then the greedy walk.

Every emitted token is the target's own argmax given exactly the tokens before it; the draft only
decides how many of them one pass yields.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.interface import SupportsEagle3
from aerie.eagle3.tree import DraftTree
from aerie.kernels.accept import accept, accept_ref
from aerie.kernels.argmax import argmax, argmax_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.llama4.cache import PagedKVCache


@dataclass(frozen=True)
class Verified:
    """`path`: committed rows; `tokens`: the new ones, the target's own (bonus) token last.

    `next_ids` holds, for every committed row, the token of the position after it, and
    `aux_hidden_states` the row's taps: what the draft is rebuilt from.
    """

    path: list[int]
    tokens: list[int]
    next_ids: list[int]
    aux_hidden_states: tuple[Tensor, ...]


class Verifier:
    """Checks drafts against `target`, whose cache holds all tokens before the root."""

    def __init__(
        self,
        target: SupportsEagle3,
        cache: PagedKVCache,
        backend: ResolvedBackend,
        tap_layers: tuple[int, ...] = (),
    ) -> None:
        """`tap_layers` are set before every pass: other drafts may share the target."""
        self.target = target
        self.cache = cache
        self.tap_layers = tap_layers
        self._argmax = pick(backend, argmax, argmax_ref)
        self._accept = pick(backend, accept, accept_ref)

    def prefill(self, ids: Sequence[int], following: Sequence[int] = ()) -> Verified:
        """Commits known tokens; `following` starts with the next known one, if there is one."""
        step = self.cache.causal_step(len(ids))
        last_row = torch.tensor([len(ids) - 1], device=step.slots_T.device)
        self.target.set_aux_hidden_state_layers(self.tap_layers)
        output = self.target(torch.tensor(ids, device=step.slots_T.device), step, last_row)
        path = list(range(len(ids)))
        self.cache.commit(0, path)
        tokens = self._finite(self._argmax(output.logits_TV).tolist())
        next_ids = [*ids[1:], *(following[:1] or tokens)]
        return Verified(path, tokens, next_ids, output.aux_hidden_states)

    def verify(self, root_T: Tensor, draft: DraftTree) -> Verified:
        """Commits the root and the accepted nodes behind it."""
        tokens_T = torch.cat((root_T, draft.tokens_N))
        step = self.cache.tree_step(draft.shape)
        self.target.set_aux_hidden_state_layers(self.tap_layers)
        output = self.target(tokens_T, step)
        acceptance = self._accept(
            tokens_T,
            torch.tensor(draft.shape.parents, device=tokens_T.device),
            self._argmax(output.logits_TV),
            step.rows.row_starts_B1,
            1 + max(draft.shape.depths()),
        )
        # one read of the device per round
        read = torch.cat((acceptance.bonus_B, acceptance.path_BP.flatten(), tokens_T)).tolist()
        path = [row for row in read[1 : -len(tokens_T)] if row >= 0]
        self.cache.commit(0, path)
        drafted = read[-len(tokens_T) :]
        tokens = [drafted[row] for row in path[1:]] + read[:1]
        aux = self._rows(output.aux_hidden_states, path)
        return Verified(path, self._finite(tokens), tokens, aux)

    def _finite(self, tokens: list[int]) -> list[int]:
        """argmax marks a row that holds NaN by a negative id."""
        if tokens[-1] < 0:
            raise FloatingPointError(
                f"the target's logits at position {self.cache.lengths[0] - 1} contain NaN"
            )
        return tokens

    @staticmethod
    def _rows(aux: Sequence[Tensor], path: list[int]) -> tuple[Tensor, ...]:
        if path == list(range(len(path))):
            return tuple(tap_TD[: len(path)] for tap_TD in aux)
        return tuple(tap_TD[path] for tap_TD in aux)
