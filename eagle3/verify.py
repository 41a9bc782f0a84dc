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
    """`path`: accepted rows from the root on; `tokens`: what follows the root, bonus token last."""

    path: list[int]
    tokens: list[int]
    aux_hidden_states: tuple[Tensor, ...]


class Verifier:
    """Checks drafts against `target`, whose cache holds all tokens before the root."""

    def __init__(
        self, target: SupportsEagle3, cache: PagedKVCache, backend: ResolvedBackend
    ) -> None:
        self.target = target
        self.cache = cache
        self._argmax = pick(backend, argmax, argmax_ref)
        self._accept = pick(backend, accept, accept_ref)

    def prefill(self, ids_T: Tensor) -> Verified:
        """Commits known tokens; the only new token is the target's next one."""
        step = self.cache.causal_step(len(ids_T))
        last_row = torch.tensor([len(ids_T) - 1], device=ids_T.device)
        output = self.target(ids_T, step, last_row)
        path = list(range(len(ids_T)))
        self.cache.commit(0, path)
        return Verified(
            path, self._finite(self._argmax(output.logits_TV).tolist()), output.aux_hidden_states
        )

    def verify(self, root_T: Tensor, draft: DraftTree) -> Verified:
        """Commits the root and the accepted nodes behind it."""
        tokens_T = torch.cat((root_T, draft.tokens_N))
        step = self.cache.tree_step(draft.shape)
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
        return Verified(path, self._finite(tokens), self._rows(output.aux_hidden_states, path))

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
