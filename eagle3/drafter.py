"""Drafting a chain: one pass over what was committed since, then one row per further level.

The draft's keys and values of guessed rows come from its own guesses of the target's hidden states.
They are forgotten after every round and rebuilt from true features in the next first pass.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.tree import DraftTree, chain


class Drafter(Protocol):
    """Proposes tokens to verify; told after every target pass what was committed."""

    def observe(self, aux_hidden_states: Sequence[Tensor], next_ids_T: Tensor) -> None: ...

    def propose(self, num_tokens: int) -> DraftTree: ...


class NoDrafter:
    """Plain decoding: nothing is proposed, every target pass yields one token."""

    def __init__(self, device: torch.device) -> None:
        self._nothing = chain(torch.empty(0, dtype=torch.int64, device=device))

    def observe(self, aux_hidden_states: Sequence[Tensor], next_ids_T: Tensor) -> None:
        """Nothing to learn from."""

    def propose(self, num_tokens: int) -> DraftTree:
        return self._nothing


class ChainDrafter:
    """Greedy chains from an Eagle3 draft, with the draft's own cache."""

    def __init__(self, draft: Eagle3Llama4ForCausalLM, max_length: int) -> None:
        self.draft = draft
        self.cache = draft.allocate_cache(max_length)
        self._aux: list[Sequence[Tensor]] = []
        self._next_ids: list[Tensor] = []

    def observe(self, aux_hidden_states: Sequence[Tensor], next_ids_T: Tensor) -> None:
        """Taps of newly committed positions and, for each, the token of the position after it."""
        self._aux.append(aux_hidden_states)
        self._next_ids.append(next_ids_T)

    def propose(self, num_tokens: int) -> DraftTree:
        """The likeliest continuation of `num_tokens` tokens, as the draft sees it."""
        if num_tokens == 0:
            return chain(self._next_ids[-1][:0])
        hidden_TD, token_T = self._first_pass()
        tokens = [token_T]
        committed = self.cache.lengths[0]
        while len(tokens) < num_tokens:
            hidden_TD, token_T = self._pass(token_T, hidden_TD)
            tokens.append(token_T)
        self.cache.rollback(0, committed)
        return chain(torch.cat(tokens))

    def _first_pass(self) -> tuple[Tensor, Tensor]:
        taps = [torch.cat(tap) if len(tap) > 1 else tap[0] for tap in zip(*self._aux, strict=True)]
        next_ids_T = torch.cat(self._next_ids)
        self._aux.clear()
        self._next_ids.clear()
        return self._pass(next_ids_T, self.draft.combine_hidden_states(taps))

    def _pass(self, ids_T: Tensor, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(state to recycle, next token) of the last row; all rows stay in the draft's cache."""
        num_rows = len(ids_T)
        output = self.draft(ids_T, hidden_TD, self.cache.causal_step(num_rows))
        self.cache.commit(0, range(num_rows))
        top = self.draft.top_tokens(output.post_norm_TD[-1:], 1)
        return output.pre_norm_TD[-1:], top.ids_TA.flatten()
