"""Several prompts of one `aerie generate`, decoded side by side."""

from collections.abc import Callable

from aerie.eagle3.generate import Decodings, Generation, generate
from aerie.eagle3.rows import Pair
from aerie.eagle3.sequences import Request as Asked
from aerie.loading import Loaded
from aerie.request import Request
from aerie.run import Outcome, image_features, with_bad_words
from aerie.text import TextStream


def run_batch(
    request: Request, loaded: Loaded, on_end: Callable[[int, int], None] | None = None
) -> list[Outcome]:
    """Outcomes in the order of the prompts; `on_end` is told how many of how many have ended.

    Prompt i is sampled with the seed + i.
    """
    target, tokenizer = loaded.target.get_language_model(), loaded.tokenizer
    sampling = with_bad_words(request, tokenizer)
    asked = [
        Asked.checked(
            target,
            prompt.ids,
            request.max_new_tokens,
            sampling=sampling.with_seed_after(number),
            detokenize=tokenizer.decode,
            images=image_features(loaded, prompt),
        )
        for number, prompt in enumerate(loaded.prompts)
    ]
    policy = request.speculation.policy_on(target, loaded.draft)
    decodings = Decodings(
        Pair(target, loaded.draft, policy),
        asked,
        request.max_batch_size,
        request.kv_cache_dtype,
        loaded.budget.kv_cache_bytes,
        loaded.budget.cuda_graph_bytes,
    )
    num_ended = 0
    for number, _ in decodings:
        if decodings.decoded[number].finish_reason is not None and on_end is not None:
            num_ended += 1
            on_end(num_ended, len(asked))
    plain = _plain(request, loaded, asked) if request.check else [None] * len(asked)
    outcomes = []
    for decoded, other in zip(decodings.decoded, plain, strict=True):
        stream = TextStream(tokenizer, sampling.stop_strings)
        stream.add(decoded.tokens)
        assert decoded.finish_reason is not None
        outcomes.append(
            Outcome(
                text=stream.text,
                tokens=decoded.tokens,
                finish_reason=decoded.finish_reason,
                stats=decoded.stats,
                plain_tokens=other and other.tokens,
                plain_stats=other and other.stats,
                seed=None if sampling.is_greedy else decoded.request.seed,
                error=decoded.error,
            )
        )
    return outcomes


def _plain(request: Request, loaded: Loaded, asked: list[Asked]) -> list[Generation]:
    """Without the draft, one at a time."""
    return generate(
        loaded.target,
        [one.prompt_ids for one in asked],
        request.max_new_tokens,
        kv_cache_dtype=request.kv_cache_dtype,
        sampling=[one.sampling for one in asked],
        detokenize=loaded.tokenizer.decode,
        images=[one.images for one in asked],
        max_batch_size=1,
    )
