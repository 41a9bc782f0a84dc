"""Speculative decoding, EAGLE-3 (arXiv 2503.01840): draft, verify, accept, commit.

Plain decoding is the same code with a drafter that proposes nothing, so what speculation is
compared with differs from it in nothing else.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.batch import Batch
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import Drafter, NoDrafter, PromptRows
from aerie.eagle3.ends import Detokenize, FinishReason
from aerie.eagle3.engine import PREFILL_ROWS, Engine, Report
from aerie.eagle3.interface import Target
from aerie.eagle3.policies import Chain, Policy
from aerie.eagle3.sampler import Sampler
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Burst, Decoded, Request, check_draft_takes_images
from aerie.eagle3.stats import Stats
from aerie.eagle3.verify import Verifier
from aerie.kernels.tree_rows import MAX_TREE_ROWS
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_plan import PAGE_SIZE
from aerie.llama4.kv_scales import KVCacheDtype
from aerie.llama4.model import Llama4ForCausalLM


class Speculation:
    """The passes of EAGLE-3 over a batch, whose state stays on the device."""

    def __init__(
        self,
        target: Llama4ForCausalLM,
        draft: Eagle3Llama4ForCausalLM | None,
        policy: Policy,
        capacity: int,
        max_length: int,
        kv_cache_dtype: KVCacheDtype = "auto",
        drafter: Drafter | None = None,
    ) -> None:
        """Room for `capacity` sequences of `max_length` tokens; a `drafter` replaces the draft."""
        if draft is not None and not draft.is_bound_to(target):
            raise ValueError("draft: was loaded for another target; load it with this one")
        self.capacity, self.policy, self.device = capacity, policy, target.lm_head.weight.device
        self.lag = 1 if self.device.type == "cuda" else 0
        depth = 0 if draft is None and drafter is None else policy.depth
        num_rows = 0 if draft is None and drafter is None else policy.num_rows
        # behind the last token: the rows of a round, and of one that was not needed
        self._slack = num_rows + 1 + self.lag * (depth + 1)
        slots, width = max_length + self._slack, target.config.hidden_size
        num_pages = capacity * -(-slots // PAGE_SIZE)
        cache = target.allocate_cache(
            slots,
            capacity,
            max_step_rows=max(PREFILL_ROWS, MAX_TREE_ROWS),
            kv_cache_dtype=kv_cache_dtype,
            num_pages=num_pages,
        )
        if drafter is None and draft is not None:
            draft_cache = draft.allocate_cache(
                slots, capacity, kv_cache_dtype=kv_cache_dtype, num_pages=num_pages
            )
            drafter = policy.drafter(draft, draft_cache, draft.tap_layers(target))
        self.drafter: Drafter = drafter or NoDrafter()
        taps, vocab_size = self.drafter.tap_layers, target.config.vocab_size
        self.batch = Batch(capacity, slots, depth + 1, len(taps), width, target.dtype, self.device)
        sampler = Sampler(self.batch.ids_BS, vocab_size, target.backend, self.device)
        self.verifier = Verifier(target, cache, self.batch, sampler, target.backend, taps)
        own = self.drafter.cache
        self.caches = [cache] if own is None else [cache, own]

    def round(self, sequences: int) -> Report:
        """One round of the first `sequences` of the batch; nothing in it asks the host."""
        start = time.perf_counter()
        draft = self.drafter.propose(self.batch.committed(sequences))
        drafted = time.perf_counter()
        verified = self.verifier.verify(sequences, draft)
        accepted = self.verifier.accept(draft, verified)
        self.verifier.commit(draft, verified, accepted)
        counts_B1 = self.batch.counts_B[:sequences, None]
        return Report(
            torch.cat((counts_B1, accepted.ids_BP), dim=1),
            draft.tokens_BN.shape[1],
            draft.depth,
            1e3 * (drafted - start),
            1e3 * (time.perf_counter() - drafted),
        )

    def prefill(self, row: int, request: Request, start: int, end: int) -> Report | None:
        """Commits tokens of a prompt; the draft follows as far as it knows the token behind a row.

        Behind the last one the next token is chosen, and reported.
        """
        batch, ids_T = self.batch, self._ids(request.prompt_ids[start:end])
        is_last, images = end == len(request.prompt_ids), request.images
        verified = self.verifier.prefill(row, start, ids_T, images, is_last=is_last)
        known = request.prompt_ids[start + 1 : end + 1]
        if known:
            start_B, next_ids_T = batch.lengths_B[row : row + 1], self._ids(known)
            prompt = PromptRows(row, start, start_B, next_ids_T, images)
            self.drafter.prefill(prompt, [tap_TD[: len(known)] for tap_TD in verified.taps_TD])
        batch.lengths_B[row] += end - start
        if not is_last:
            return None
        batch.begin(row, verified.target_ids_T, [tap_TD[-1:] for tap_TD in verified.taps_TD])
        one = torch.ones_like(verified.target_ids_T)
        return Report(torch.stack((one, verified.target_ids_T), dim=1))

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)

    def has_room_for(self, request: Request) -> bool:
        return all(cache.has_room_for(request.max_length + self._slack) for cache in self.caches)

    def join(self, row: int, request: Request) -> None:
        """Row `row` is the request's, with all the pages it can need."""
        for cache in self.caches:
            cache.admit(row, request.max_length + self._slack)
        self.batch.join(row, self._ids(request.prompt_ids))
        end_ids, num_prompt = request.ends.eos_token_ids, len(request.prompt_ids)
        self.verifier.sampler.join(row, request.sampling, request.seed, end_ids, num_prompt)

    def move(self, source: int, target: int) -> None:
        """The sequence of row `source` goes on in row `target`, which has been left."""
        for cache in self.caches:
            cache.move(source, target)
        self.batch.move(source, target)
        self.verifier.sampler.move(source, target)

    def leave(self, row: int) -> None:
        for cache in self.caches:
            cache.release(row)
        self.batch.leave(row)


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
        target = target.get_language_model()
        request = Request.checked(
            target, prompt_ids, max_new_tokens, eos_token_ids, sampling, detokenize, images
        )
        if images is not None and draft is not None:
            check_draft_takes_images(draft, target)
        policy = Chain(num_speculative_tokens) if policy is None else policy
        self.passes = Speculation(
            target, draft, policy, 1, request.max_length, kv_cache_dtype, drafter
        )
        self._engine = Engine(self.passes, self.passes.lag)
        self._decoded = self._engine.add(request)
        self._is_started = False

    @property
    def tokens(self) -> list[int]:
        return self._decoded.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._decoded.finish_reason

    @property
    def stats(self) -> Stats:
        return self._decoded.stats

    @property
    def seed(self) -> int | None:
        """Repeats a sampled run."""
        return self._decoded.request.reported_seed

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Burst]:
        """Closing the iterator between two bursts cancels the rest and frees its pages."""
        if self._is_started:
            raise ValueError("decoding: a Decoding is iterated once; build another one")
        self._is_started = True
        try:
            while self._engine.has_work:
                for _, burst in self._engine.step():
                    yield burst
        finally:
            self._engine.cancel(self._decoded)


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
    for _ in decoding:
        pass
    return generation_of(decoding._decoded)


def generation_of(decoded: Decoded) -> Generation:
    assert decoded.finish_reason is not None
    seed = decoded.request.reported_seed
    return Generation(decoded.tokens, decoded.finish_reason, decoded.stats, seed)
