"""Several prompts of one `aerie generate`, decoded side by side."""

from dataclasses import dataclass

from rich.console import Console

from aerie.eagle3.generate import Decodings, generate
from aerie.eagle3.rows import Pair
from aerie.eagle3.sequences import Request as Asked
from aerie.eagle3.stats import BatchRound
from aerie.eagle3.streams import Generation
from aerie.loading import Loaded
from aerie.progress import decoding
from aerie.request import Request
from aerie.run import Outcome, image_features
from aerie.text import TextStream


@dataclass(frozen=True)
class BatchOutcome:
    """What came out of every prompt, in their order, and the rounds that they shared."""

    outcomes: list[Outcome]
    rounds: list[BatchRound]


def run_batch(request: Request, loaded: Loaded, console: Console) -> BatchOutcome:
    """Prompt i is sampled with the seed + i. `console` shows how many have ended."""
    target, tokenizer = loaded.target.get_language_model(), loaded.tokenizer
    sampling = request.sampling_with(tokenizer)
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
    most = max(1, min(request.max_batch_size, len(asked)))
    policy = request.speculation.policy_on(target, loaded.draft, most)
    decodings = Decodings(
        Pair(target, loaded.draft, policy),
        asked,
        request.max_batch_size,
        request.kv_cache_dtype,
        loaded.budget.kv_cache_bytes,
        loaded.budget.cuda_graph_bytes,
    )
    num_ended = num_tokens = 0
    with decoding(len(asked), console) as told:
        for number, burst in decodings:
            num_ended += decodings.decoded[number].finish_reason is not None
            num_tokens += len(burst)
            if told is not None:
                told(num_ended, num_tokens)
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
    return BatchOutcome(outcomes, decodings.engine.rounds)


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
