"""One run of `aerie generate` over a loaded pair, and what came out."""

import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

from rich.console import Console

from aerie.eagle3.decoding import Decoding
from aerie.eagle3.ends import FinishReason
from aerie.eagle3.generate import generate
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Burst
from aerie.eagle3.stats import Stats
from aerie.eagle3.streams import Generation
from aerie.llama4.expert_counts import counted_experts
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.model import Llama4ForCausalLM
from aerie.loading import Loaded
from aerie.progress import reading_prompt
from aerie.prompting import Prompt
from aerie.request import Request
from aerie.text import TextStream


@dataclass(frozen=True)
class Outcome:
    """`identical` is None unless the plain tokens were decoded for comparison."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    plain_tokens: list[int] | None
    plain_stats: Stats | None
    seed: int | None = None  # of a sampled run
    distinct_experts: dict[int, float] | None = None  # a layer, by rows of a pass, if counted
    error: str | None = None  # why the text ends, if `finish_reason` is "error"

    @property
    def identical(self) -> bool | None:
        return None if self.plain_tokens is None else self.plain_tokens == self.tokens


def run(
    request: Request, loaded: Loaded, on_text: Callable[[str], None] | None, console: Console
) -> Outcome:
    """Decodes; `on_text` receives the text as its tokens are accepted. `console` shows how far a
    long prompt has been read."""
    images = image_features(loaded, loaded.prompt)
    target = loaded.target.get_language_model()
    sampling = request.sampling_with(loaded.tokenizer)
    decoding = Decoding(
        target,
        loaded.prompt.ids,
        request.max_new_tokens,
        loaded.draft,
        kv_cache_dtype=request.kv_cache_dtype,
        policy=request.speculation.policy_on(target, loaded.draft),
        sampling=sampling,
        detokenize=loaded.tokenizer.decode,
        images=images,
        kv_cache_bytes=loaded.budget.kv_cache_bytes,
        cuda_graph_bytes=loaded.budget.cuda_graph_bytes,
    )
    stream, bursts = TextStream(loaded.tokenizer, sampling.stop_strings), iter(decoding)
    with reading_prompt(len(loaded.prompt.ids), console) as decoding.decoded.on_prefill:
        first = list(itertools.islice(bursts, 1))  # the prompt's passes are not counted
    _show(stream, first, on_text)
    counting = counted_experts(target) if request.count_experts else nullcontext()
    with counting as counts:
        _show(stream, bursts, on_text)
    if on_text is not None:
        on_text(stream.flush())
    assert decoding.finish_reason is not None
    plain = _plain(request, loaded, images, sampling) if request.check else None
    return Outcome(
        text=stream.text,
        tokens=decoding.tokens,
        finish_reason=decoding.finish_reason,
        stats=decoding.stats,
        plain_tokens=plain and plain.tokens,
        plain_stats=plain and plain.stats,
        seed=None if sampling.is_greedy else decoding.seed,
        distinct_experts=counts and counts.read(),
    )


def _show(
    stream: TextStream, bursts: Iterable[Burst], on_text: Callable[[str], None] | None
) -> None:
    for burst in bursts:
        text = stream.add(burst.tokens)
        if on_text is not None and text:
            on_text(text)


def _plain(
    request: Request, loaded: Loaded, images: ImageFeatures | None, sampling: SamplingParams
) -> Generation:
    return generate(
        loaded.target,
        loaded.prompt.ids,
        request.max_new_tokens,
        kv_cache_dtype=request.kv_cache_dtype,
        sampling=sampling,
        detokenize=loaded.tokenizer.decode,
        images=images,
    )


def image_features(loaded: Loaded, prompt: Prompt) -> ImageFeatures | None:
    """One pass of the vision tower over a prompt's tiles; placeholders without one are refused.

    Raises ValueError with both numbers.
    """
    target = loaded.target
    if isinstance(target, Llama4ForCausalLM):
        return None
    return target.image_features(prompt.ids, prompt.pixel_values)
