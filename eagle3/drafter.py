"""Drafting a chain: one pass over what was committed since, then one row per further level.

The draft's keys and values of guessed rows come from its own guesses of the target's hidden states.
They are forgotten after every round and rebuilt from true features in the next first pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.tree import DraftTree, GoesOn, chain
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_scales import KVCacheDtype


class Drafter(Protocol):
    """Proposes tokens to verify; told after every target pass what was committed."""

    tap_layers: tuple[int, ...]  # inputs of target layers it wants to observe

    def observe(
        self,
        aux_hidden_states: Sequence[Tensor],
        next_ids_T: Tensor,
        images: ImageFeatures | None = None,
    ) -> None: ...

    def propose(self, num_tokens: int) -> DraftTree: ...


class NoDrafter:
    """Plain decoding: nothing is proposed, every target pass yields one token."""

    tap_layers: tuple[int, ...] = ()

    def __init__(self, device: torch.device) -> None:
        self._nothing = chain(torch.empty(0, dtype=torch.int64, device=device))

    def observe(
        self,
        aux_hidden_states: Sequence[Tensor],
        next_ids_T: Tensor,
        images: ImageFeatures | None = None,
    ) -> None:
        """Nothing to learn from."""

    def propose(self, num_tokens: int) -> DraftTree:
        return self._nothing


@dataclass(frozen=True)
class Level:
    """One drafted token and the state its own row would start from."""

    hidden_TD: Tensor
    token_T: Tensor
    logprob_T: Tensor


class ChainDrafter:
    """Greedy chains from an Eagle3 draft, with the draft's own cache."""

    def __init__(
        self,
        draft: Eagle3Llama4ForCausalLM,
        max_length: int,
        tap_layers: tuple[int, ...] = (),
        kv_cache_dtype: KVCacheDtype = "auto",
        goes_on: GoesOn | None = None,
    ) -> None:
        """`tap_layers` as `draft.tap_layers(target)` gives them."""
        self.goes_on = goes_on
        self.draft = draft
        self.tap_layers = tap_layers
        self.cache = draft.allocate_cache(max_length, kv_cache_dtype=kv_cache_dtype)
        self._last: Level | None = None

    def observe(
        self,
        aux_hidden_states: Sequence[Tensor],
        next_ids_T: Tensor,
        images: ImageFeatures | None = None,
    ) -> None:
        """Catches up on committed positions: their taps and, for each, the token after it, or the
        feature where the prompt's `images` stand there."""
        hidden_TD = self.draft.combine_hidden_states(aux_hidden_states)
        embeds_TD = self.draft.merged_embeddings(next_ids_T, self.cache.lengths[0], images)
        self._last = self._pass(next_ids_T, hidden_TD, embeds_TD)

    def propose(self, num_tokens: int) -> DraftTree:
        """The likeliest continuation of `num_tokens` tokens, as the draft sees it."""
        assert self._last is not None, "observe comes first"
        level, committed = self._last, self.cache.lengths[0]
        tokens, scores = [level.token_T], [level.logprob_T]
        while len(tokens) < num_tokens:
            if self.goes_on is not None and not self.goes_on(scores[-1]):
                break
            level = self._pass(level.token_T, level.hidden_TD)
            tokens.append(level.token_T)
            scores.append(scores[-1] + level.logprob_T)
        self.cache.rollback(0, committed)
        return chain(torch.cat(tokens)[:num_tokens], torch.cat(scores)[:num_tokens])

    def _pass(self, ids_T: Tensor, hidden_TD: Tensor, embeds_TD: Tensor | None = None) -> Level:
        """What the last row yields; all rows stay in the draft's cache."""
        num_rows = len(ids_T)
        output = self.draft(ids_T, hidden_TD, self.cache.causal_step(num_rows), embeds_TD)
        self.cache.commit(0, range(num_rows))
        top = self.draft.top_tokens(output.post_norm_TD[-1:], 1)
        return Level(output.next_hidden_TD[-1:], top.ids_TA.flatten(), top.logprobs_TA[:, 0])
