"""Speculative decoding, EAGLE-3 (arXiv 2503.01840): draft, verify, accept, commit.

Plain decoding is the same code with a drafter that proposes nothing, so what speculation is
compared with differs from it in nothing else.
"""

import time
from collections.abc import Sequence
from typing import overload

import torch

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import PromptRows
from aerie.eagle3.ends import Detokenize
from aerie.eagle3.engine import Engine, Report
from aerie.eagle3.graphs import GraphedRounds
from aerie.eagle3.interface import Target
from aerie.eagle3.parallel_draft import RemoteDraft
from aerie.eagle3.policies import Chain, Policy
from aerie.eagle3.rows import Pair, Rows
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Request, check_draft_takes_images
from aerie.eagle3.streams import Generation, Stream
from aerie.eagle3.verify import Verifier
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_scales import KVCacheDtype

MAX_BATCH_SIZE = 8


class Speculation:
    """The passes of EAGLE-3 over the sequences of a batch, whose state stays on the device."""

    def __init__(self, pair: Pair, rows: Rows) -> None:
        self.rows, self.drafter, self.batch = rows, rows.drafter, rows.batch
        backend, taps = pair.target.backend, rows.drafter.tap_layers
        self.verifier = Verifier(pair.target, rows.cache, rows.batch, rows.sampler, backend, taps)

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
        batch, ids_T = self.batch, self.rows.ids(request.prompt_ids[start:end])
        is_last, images = end == len(request.prompt_ids), request.images
        verified = self.verifier.prefill(row, start, ids_T, images, is_last=is_last)
        known = request.prompt_ids[start + 1 : end + 1]
        if known:
            start_B, next_ids_T = batch.lengths_B[row : row + 1], self.rows.ids(known)
            prompt = PromptRows(row, start, start_B, next_ids_T, images)
            self.drafter.prefill(prompt, [tap_TD[: len(known)] for tap_TD in verified.taps_TD])
        batch.has_run(row, end)
        if not is_last:
            return None
        batch.begin(row, verified.target_ids_T, [tap_TD[-1:] for tap_TD in verified.taps_TD])
        one = torch.ones_like(verified.target_ids_T)
        return Report(torch.stack((one, verified.target_ids_T), dim=1))


class Decodings(Stream):
    """Requests decoded together, at most `max_batch_size` at a time, the others as these end."""

    def __init__(
        self,
        pair: Pair,
        requests: Sequence[Request],
        max_batch_size: int = MAX_BATCH_SIZE,
        kv_cache_dtype: KVCacheDtype = "auto",
        kv_cache_bytes: int | None = None,
        cuda_graph_bytes: int = 0,
    ) -> None:
        """`kv_cache_bytes` bounds the memory of keys and values; requests wait for it. With
        `cuda_graph_bytes` rounds are captured as graphs of so much memory of their own.

        Raises ValueError for no requests, a size < 1, and a request that does not fit alone.
        """
        if not requests or max_batch_size < 1:
            raise ValueError(
                f"requests, max_batch_size: at least 1 of each, got {len(requests)} and "
                f"{max_batch_size}"
            )
        draft, has_images = pair.draft, any(request.images for request in requests)
        if isinstance(draft, Eagle3Llama4ForCausalLM) and has_images:
            check_draft_takes_images(draft, pair.target)
        capacity = min(max_batch_size, len(requests))
        lengths = [request.max_length for request in requests]
        self.rows = Rows(pair, lengths, capacity, kv_cache_dtype, kv_cache_bytes)
        self.passes = Speculation(pair, self.rows)
        passes = self.passes
        if cuda_graph_bytes > 0:
            passes = GraphedRounds(self.passes, requests, cuda_graph_bytes)
        engine = Engine(passes, self.rows, pair.lag)
        super().__init__(engine, [engine.add(request) for request in requests])


@overload
def generate(
    target: Target,
    prompt_ids: Sequence[int],
    max_new_tokens: int | None = None,
    draft: Eagle3Llama4ForCausalLM | RemoteDraft | None = None,
    num_speculative_tokens: int = 4,
    eos_token_ids: Sequence[int] | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    *,
    policy: Policy | None = None,
    sampling: SamplingParams | None = None,
    detokenize: Detokenize | None = None,
    images: ImageFeatures | None = None,
) -> Generation: ...


@overload
def generate(
    target: Target,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    draft: Eagle3Llama4ForCausalLM | RemoteDraft | None = None,
    num_speculative_tokens: int = 4,
    eos_token_ids: Sequence[int] | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    *,
    policy: Policy | None = None,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    detokenize: Detokenize | None = None,
    images: Sequence[ImageFeatures | None] | None = None,
    max_batch_size: int = MAX_BATCH_SIZE,
    kv_cache_bytes: int | None = None,
    cuda_graph_bytes: int = 0,
) -> list[Generation]: ...


def generate(
    target,
    prompt_ids,
    max_new_tokens=None,
    draft=None,
    num_speculative_tokens=4,
    eos_token_ids=None,
    kv_cache_dtype: KVCacheDtype = "auto",
    *,
    policy=None,
    sampling=None,
    detokenize=None,
    images=None,
    max_batch_size=MAX_BATCH_SIZE,
    kv_cache_bytes=None,
    cuda_graph_bytes=0,
):
    """Decodes a prompt, or a list of prompts side by side; with a `draft`, the same tokens in
    fewer target passes.

    Of a list, `max_batch_size` run at a time, each with its own entry of `sampling` and `images`
    if these are lists; the results come in order and are those of each prompt alone.
    `kv_cache_dtype` "fp8" keeps keys and values as e4m3 codes: half of bfloat16's memory and reads.
    `kv_cache_bytes` bounds them; prompts wait until there is room. `cuda_graph_bytes` is for rounds
    captured as CUDA graphs before the first token. Raises ValueError for an empty
    or too long prompt, ids outside the vocabulary, counts < 1, another cache dtype, or a prompt
    that the memory does not hold, and FloatingPointError where the target's logits are no
    distribution; in a list that prompt's `finish_reason` is "error", and the others go on.
    """
    target = target.get_language_model()
    is_list = len(prompt_ids) > 0 and _is_prompt(prompt_ids[0])
    prompts = list(prompt_ids) if is_list else [prompt_ids]
    samplings = _each("sampling", sampling, prompts, is_list and isinstance(sampling, Sequence))
    features = _each("images", images, prompts, is_list and images is not None)
    requests = [
        Request.checked(target, prompt, max_new_tokens, eos_token_ids, params, detokenize, rows)
        for prompt, params, rows in zip(prompts, samplings, features, strict=True)
    ]
    pair = Pair(target, draft, Chain(num_speculative_tokens) if policy is None else policy)
    memory = kv_cache_bytes, cuda_graph_bytes
    decodings = Decodings(pair, requests, max_batch_size, kv_cache_dtype, *memory)
    for _ in decodings:
        pass
    results = [Generation.of(decoded) for decoded in decodings.decoded]
    if is_list:
        return results
    if results[0].error is not None:
        raise FloatingPointError(results[0].error)
    return results[0]


def _is_prompt(entry) -> bool:
    """Whether it is one of several prompts, such as a row of an array, and not an id."""
    return isinstance(entry, Sequence) or getattr(entry, "ndim", 0) > 0


def _each(name: str, value, prompts: list, is_list: bool) -> list:
    if not is_list:
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise ValueError(f"{name}: one for each of {len(prompts)} prompts, got {len(value)}")
    return list(value)
