"""Speculative decoding, EAGLE-3 (arXiv 2503.01840): draft, verify, accept, commit.

One sequence, greedy or sampled. The plain loop is the same code with a drafter that proposes
nothing, so what speculation is compared with differs from it in nothing else.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import SupportsIndex

import torch
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import Drafter, NoDrafter
from aerie.eagle3.ends import Detokenize, Ends, FinishReason
from aerie.eagle3.interface import Target
from aerie.eagle3.policies import Chain, Policy
from aerie.eagle3.prefixes import History
from aerie.eagle3.sampler import Sampler
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.stats import Stats
from aerie.eagle3.verify import Verified, Verifier
from aerie.kernels.tree_rows import MAX_TREE_ROWS
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_scales import KVCacheDtype
from aerie.llama4.model import Llama4ForCausalLM

PREFILL_ROWS = 1024  # rows of one prefill pass; bounds its activations
DEAD_DRAFT = (
    "the draft looks dead: %.0f of 100 first drafted tokens were accepted in %d drafts. The text "
    "is right but not faster; `aerie probe` tests the known ways to misread a draft"
)

logger = logging.getLogger("aerie.eagle3")


@dataclass(frozen=True)
class Generation:
    """`tokens` after the prompt, the end token included; why it stopped; what it took.

    A sampled run is repeated by its `seed`.
    """

    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    seed: int | None = None


class Decoding:
    """One sequence being decoded. Iterating yields the accepted tokens in bursts."""

    def __init__(
        self,
        target: Target,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None = None,
        draft: Eagle3Llama4ForCausalLM | None = None,
        num_speculative_tokens: int = 4,
        eos_token_ids: Sequence[int] | None = None,
        drafter: Drafter | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        *,
        policy: Policy | None = None,
        sampling: SamplingParams | None = None,
        detokenize: Detokenize | None = None,
        images: ImageFeatures | None = None,
    ) -> None:
        """`eos_token_ids` None means the checkpoint's own; `drafter` replaces the draft's chain.

        `policy` None is a chain of `num_speculative_tokens`. `kv_cache_dtype` is that of the
        target's cache and of the draft's. `sampling` None is greedy. The token limit is
        `max_new_tokens` or `sampling.max_tokens`. `images` stand at placeholders of the prompt.
        """
        sampling = SamplingParams() if sampling is None else sampling
        max_new_tokens = _token_limit(max_new_tokens, sampling)
        target = target.get_language_model()
        _check_prompt(prompt_ids, max_new_tokens, target)
        if images is not None:
            _check_images(images, prompt_ids, target, draft)
        sampling.check_vocabulary(target.config.vocab_size)
        self.policy = Chain(num_speculative_tokens) if policy is None else policy
        self.context = target.config.max_position_embeddings
        self.device = target.lm_head.weight.device
        self.prompt_ids = list(prompt_ids)
        self.images = images
        eos = target.config.eos_token_ids if eos_token_ids is None else eos_token_ids
        self.ends = Ends(
            frozenset(eos),
            frozenset(sampling.stop_token_ids),
            sampling.stop_strings,
            sampling.min_tokens,
            max_new_tokens,
            len(self.prompt_ids),
            self.context,
            detokenize,
        )
        longest = min(self.context, len(self.prompt_ids) + max_new_tokens)
        capacity = longest + self.policy.num_rows + 1
        largest_step = max(PREFILL_ROWS, MAX_TREE_ROWS)
        cache = target.allocate_cache(
            capacity, max_step_rows=largest_step, kv_cache_dtype=kv_cache_dtype
        )
        self.drafter = drafter or _drafter(self.policy, draft, target, capacity, kv_cache_dtype)
        history = History(self.prompt_ids, self.context, self.device)
        vocab_size = target.config.vocab_size
        self.sampler = Sampler(sampling, history, eos, vocab_size, target.backend, self.device)
        taps = self.drafter.tap_layers
        self.verifier = Verifier(target, cache, self.sampler, target.backend, taps)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stats = Stats()
        self._is_started = False
        self._has_warned = False

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[int]]:
        if self._is_started:
            raise ValueError("decoding: a Decoding is iterated once; build another one")
        self._is_started = True
        with self.stats.timed("total"), self.stats.timed("prefill"):
            verified = self._prefill()
        yield self._keep(verified.tokens)
        while self.finish_reason is None:
            with self.stats.timed("total"):
                verified = self._round(verified)
            yield self._keep(verified.tokens)

    def _round(self, last: Verified) -> Verified:
        """Draft from what the last pass committed, verify, book."""
        with self.stats.timed("draft"):
            self.drafter.observe(last.aux_hidden_states, self._ids(last.next_ids), self.images)
            draft = self.drafter.propose(self._room())
        with self.stats.timed("verify"):
            verified = self.verifier.verify(self._ids(last.tokens[-1:]), draft)
        self.stats.count_draft(len(draft.tokens_N), len(verified.path) - 1, draft.depth)
        if self.stats.is_at_the_floor and not self._has_warned:
            self._has_warned = True
            first = 100 * self.stats.acceptance_per_position[0]
            logger.warning(DEAD_DRAFT, first, self.stats.num_drafts)
        return verified

    def _prefill(self) -> Verified:
        """Commits the prompt in bounded passes; the drafter follows all but the last of them."""
        parts = [
            self.prompt_ids[start : start + PREFILL_ROWS]
            for start in range(0, len(self.prompt_ids), PREFILL_ROWS)
        ]
        for part, following in pairwise([*parts, []]):
            verified = self.verifier.prefill(part, following, self.images)
            self.stats.num_target_passes += 1
            if following:
                next_ids = self._ids(verified.next_ids)
                self.drafter.observe(verified.aux_hidden_states, next_ids, self.images)
        return verified

    def _keep(self, run: list[int]) -> list[int]:
        """The part of an accepted run that is output."""
        burst, self.finish_reason = self.ends.cut(self.tokens, run)
        self.tokens += burst
        self.sampler.observe(burst)
        self.stats.num_tokens = len(self.tokens)
        return burst

    def _room(self) -> int:
        """Levels to draft: fewer where even the bonus token would not fit into the context."""
        written = len(self.prompt_ids) + len(self.tokens)
        return min(self.policy.depth, self.context - written - 1)

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)


def generate(
    target: Target,
    prompt_ids: Sequence[int],
    max_new_tokens: int | None = None,
    draft: Eagle3Llama4ForCausalLM | None = None,
    num_speculative_tokens: int = 4,
    eos_token_ids: Sequence[int] | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    *,
    policy: Policy | None = None,
    sampling: SamplingParams | None = None,
    detokenize: Detokenize | None = None,
    images: ImageFeatures | None = None,
) -> Generation:
    """Decodes one prompt; with a `draft`, the same tokens in fewer target passes.

    `kv_cache_dtype` "fp8" keeps keys and values as e4m3 codes: half of bfloat16's memory and reads.
    Raises ValueError for an empty or too long prompt, ids outside the vocabulary, counts < 1, or
    another cache dtype, and FloatingPointError where the target's logits are no distribution.
    """
    decoding = Decoding(
        target,
        prompt_ids,
        max_new_tokens,
        draft,
        num_speculative_tokens,
        eos_token_ids,
        kv_cache_dtype=kv_cache_dtype,
        policy=policy,
        sampling=sampling,
        detokenize=detokenize,
        images=images,
    )
    tokens = [token for burst in decoding for token in burst]
    assert decoding.finish_reason is not None
    return Generation(tokens, decoding.finish_reason, decoding.stats, decoding.sampler.seed)


def _token_limit(max_new_tokens: int | None, sampling: SamplingParams) -> int:
    limits = [limit for limit in (max_new_tokens, sampling.max_tokens) if limit is not None]
    if not limits:
        raise ValueError("max_new_tokens: give it, or max_tokens in the sampling parameters")
    return min(limits)


def _drafter(
    policy: Policy,
    draft: Eagle3Llama4ForCausalLM | None,
    target: Llama4ForCausalLM,
    capacity: int,
    kv_cache_dtype: KVCacheDtype,
) -> Drafter:
    if draft is None:
        return NoDrafter(target.lm_head.weight.device)
    if not draft.is_bound_to(target):
        raise ValueError("draft: was loaded for another target; load it with this one")
    return policy.drafter(draft, capacity, draft.tap_layers(target), kv_cache_dtype)


def _check_prompt(
    prompt_ids: Sequence[int], max_new_tokens: int, target: Llama4ForCausalLM
) -> None:
    """Raises ValueError for what `target` cannot continue by `max_new_tokens`."""
    context, vocab_size = target.config.max_position_embeddings, target.config.vocab_size
    if not 1 <= len(prompt_ids) < context:
        raise ValueError(
            f"prompt_ids: must hold 1..{context - 1} tokens (the context is {context}), "
            f"got {len(prompt_ids)}"
        )
    outside = [t for t in prompt_ids if not (isinstance(t, SupportsIndex) and 0 <= t < vocab_size)]
    if outside:
        raise ValueError(f"prompt_ids: must lie in 0..{vocab_size - 1}, got {outside[:5]}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")


def _check_images(
    images: ImageFeatures,
    prompt_ids: Sequence[int],
    target: Llama4ForCausalLM,
    draft: Eagle3Llama4ForCausalLM | None,
) -> None:
    """Raises ValueError for image rows that prompt, target or draft cannot take."""
    width = target.config.hidden_size
    if images.rows_FD.shape[1] != width:
        raise ValueError(f"images: rows must be {width} wide, got {images.rows_FD.shape[1]}")
    if images.positions and images.positions[-1] >= len(prompt_ids):
        raise ValueError(
            f"images: reach position {images.positions[-1]} of a prompt of {len(prompt_ids)} tokens"
        )
    if draft is None or draft.config.draft_multimodal == "text":
        return
    if draft.config.hidden_size != width:
        raise ValueError(
            f"draft: of width {draft.config.hidden_size}, cannot take image features of the "
            f'target\'s {width}; load it with "draft_multimodal": "text"'
        )
