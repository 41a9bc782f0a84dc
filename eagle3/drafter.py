"""Drafting a chain: one pass over what was committed since, then one row per further level.

The draft's keys and values of guessed rows come from its own guesses of the target's hidden states.
Nothing commits them: the next round starts behind the committed rows, which it builds from true
features, and overwrites them.

Letters: B sequences, P rows committed in a round at most, N drafted nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from aerie.eagle3.batch import Committed
from aerie.eagle3.draft import DraftOutput, Eagle3Llama4ForCausalLM
from aerie.eagle3.sampled_drafts import Draws
from aerie.eagle3.tree import DraftTree, GoesOn, chain
from aerie.kernels.draft_vocab import DraftTokens
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.device_steps import (
    chain_shape,
    counting,
    device_step,
    successive_steps,
)
from aerie.llama4.image_features import ImageFeatures


@dataclass(frozen=True)
class PromptRows:
    """Rows of one sequence from position `start` on, and the token behind each of them."""

    sequence: int
    start: int
    start_B: Tensor  # the same, on the device
    next_ids_T: Tensor
    images: ImageFeatures | None = None


class Drafter(Protocol):
    """Proposes tokens to verify. Its cache, if any, has the rows and pages of the target's."""

    tap_layers: tuple[int, ...]  # inputs of target layers it wants to observe

    @property
    def cache(self) -> PagedKVCache | None: ...

    def prefill(self, prompt: PromptRows, taps_TD: Sequence[Tensor]) -> None:
        """Takes in committed rows of a prompt, of which the next tokens are known."""
        ...

    def propose(self, committed: Committed) -> DraftTree:
        """Catches up on what was committed, and drafts behind it."""
        ...


class NoDrafter:
    """Plain decoding: nothing is proposed, every target pass yields one token."""

    tap_layers: tuple[int, ...] = ()
    cache = None

    def prefill(self, prompt: PromptRows, taps_TD: Sequence[Tensor]) -> None:
        """Nothing to learn from."""

    def propose(self, committed: Committed) -> DraftTree:
        return chain(committed.next_ids_BP[:, :0])


class CachedDrafter:
    """What all drafters with a draft share: its cache, and the pass over committed rows."""

    draws: Draws | None = None  # what draws the drafts, if they are not to be the likeliest

    def __init__(
        self,
        draft: Eagle3Llama4ForCausalLM,
        cache: PagedKVCache,
        tap_layers: tuple[int, ...] = (),
        goes_on: GoesOn | None = None,
    ) -> None:
        """`tap_layers` as `draft.tap_layers(target)` gives them."""
        self.draft, self.cache, self.tap_layers, self.goes_on = draft, cache, tap_layers, goes_on

    def prefill(self, prompt: PromptRows, taps_TD: Sequence[Tensor]) -> None:
        """Where the prompt's images stand their features are what the draft sees."""
        next_ids_T = prompt.next_ids_T
        hidden_TD = self.draft.combine_hidden_states(taps_TD)
        embeds_TD = self.draft.merged_embeddings(next_ids_T, prompt.start, prompt.images)
        shape = chain_shape(len(next_ids_T), next_ids_T.device)
        step = device_step(self.cache, prompt.start_B, shape, prompt.sequence)
        self.draft(next_ids_T, hidden_TD, step, embeds_TD)

    def _siblings(
        self, post_norm_TD: Tensor, roots_B: Tensor, level: int, rows: Sequence[int], count: int
    ) -> DraftTokens:
        """`count` tokens behind each of the `rows` of every tree: the likeliest, or drawn ones.

        The trees' roots stand at positions `roots_B`, and these tokens `level` further on.
        """
        if self.draws is None:
            return self.draft.top_tokens(post_norm_TD, count)
        return self.draws.siblings(post_norm_TD, roots_B + level, rows, count)

    def _catch_up(self, committed: Committed) -> DraftOutput:
        """Of the last committed row of every sequence: [B, D] states, to draft from."""
        sequences, rows = committed.next_ids_BP.shape
        device = committed.counts_B.device
        hidden_TD = self.draft.combine_hidden_states(
            [tap_BPD.flatten(0, 1) for tap_BPD in committed.taps_BPD]
        )
        step = device_step(self.cache, committed.starts_B, chain_shape(rows, device))
        output = self.draft(committed.next_ids_BP.contiguous().view(-1), hidden_TD, step)
        if rows == 1:
            return output
        # -1 where the first row is idle: indexing takes it, and nobody looks at the result
        last_B = committed.counts_B - 1 + rows * counting(sequences, device)
        return DraftOutput(output.post_norm_TD[last_B], output.next_hidden_TD[last_B])


class ChainDrafter(CachedDrafter):
    """Chains from an Eagle3 draft: of its likeliest tokens, or drawn."""

    def __init__(self, num_tokens: int, *draft_and_cache) -> None:
        super().__init__(*draft_and_cache)
        self.num_tokens = num_tokens

    def propose(self, committed: Committed) -> DraftTree:
        """A continuation of `num_tokens` tokens, as the draft sees it."""
        draft, lengths_B = self.draft, committed.lengths_B
        output = self._catch_up(committed)
        top = self._siblings(output.post_norm_TD, lengths_B, 1, [0], 1)
        tokens, scores = [top.ids_TA], [top.logprobs_TA]
        further = successive_steps(self.cache, lengths_B, self.num_tokens - 1)
        turns = draft.rotation(further.positions_NB.view(-1)).split(len(lengths_B))
        for row, (step, own_turns) in enumerate(zip(further.steps, turns, strict=True), start=1):
            if self.goes_on is not None and not self.goes_on(scores[-1]):
                break
            ids_B = tokens[-1].flatten()
            output = draft(ids_B, output.next_hidden_TD, step, turns=own_turns)
            top = self._siblings(output.post_norm_TD, lengths_B, row + 1, [row], 1)
            tokens.append(top.ids_TA)
            scores.append(scores[-1] + top.logprobs_TA)
        drafted = chain(torch.cat(tokens, dim=1), torch.cat(scores, dim=1))
        if self.draws is None:
            return drafted
        return replace(drafted, drawn=self.draws.drawn(range(-1, len(tokens))))
