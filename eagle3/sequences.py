"""One request on its way: what was asked, how far it is, and why it ended."""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.ends import Detokenize, Ends, FinishReason
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.stats import Stats
from aerie.kernels.scaled_linear import quantises_rows
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.model import Llama4ForCausalLM


@dataclass(frozen=True)
class Burst:
    """Tokens that one target pass added: the drafted ones it accepted, then, unless the text ends
    before it, its own (bonus) token."""

    tokens: tuple[int, ...]
    num_accepted: int

    def __iter__(self) -> Iterator[int]:
        return iter(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Request:
    """A prompt and what is asked for it. `Request.checked` raises ValueError."""

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    seed: int
    ends: Ends
    images: ImageFeatures | None = None

    @classmethod
    def checked(
        cls,
        target: Llama4ForCausalLM,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None,
        eos_token_ids: Sequence[int] | None = None,
        sampling: SamplingParams | None = None,
        detokenize: Detokenize | None = None,
        images: ImageFeatures | None = None,
    ) -> "Request":
        """`eos_token_ids` None means the checkpoint's own; a seed of None is drawn here."""
        sampling = SamplingParams() if sampling is None else sampling
        limit = _token_limit(max_new_tokens, sampling)
        _check_prompt(prompt_ids, limit, target)
        if images is not None:
            _check_images(images, prompt_ids, target)
        sampling.check_vocabulary(target.config.vocab_size)
        if target.communicator is not None and sampling.logits_processors:
            raise ValueError(
                "logits_processors: take whole rows of logits, which a target that is cut over "
                f"ranks never has, got {len(sampling.logits_processors)}"
            )
        eos = target.config.eos_token_ids if eos_token_ids is None else eos_token_ids
        ends = Ends(
            frozenset(eos),
            frozenset(sampling.stop_token_ids),
            sampling.stop_strings,
            sampling.min_tokens,
            limit,
            len(prompt_ids),
            target.config.max_position_embeddings,
            detokenize,
        )
        seed = sampling.seed
        if seed is None:
            seed = 0 if sampling.is_greedy else int(torch.randint(2**63 - 1, ()))
            if target.communicator is not None and not sampling.is_greedy:
                seed = target.communicator.from_first(seed)
        return cls(list(prompt_ids), limit, sampling, seed, ends, images)

    @property
    def reported_seed(self) -> int | None:
        """None where no seed was given and none was needed."""
        return None if self.sampling.is_greedy and self.sampling.seed is None else self.seed

    @property
    def max_length(self) -> int:
        """Tokens of prompt and output at most."""
        return min(self.ends.context, len(self.prompt_ids) + self.max_new_tokens)


@dataclass(eq=False)
class Decoded:
    """A request's tokens so far. It ends once, with a `finish_reason`; if that is "error", `error`
    says what it was."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    stats: Stats = field(default_factory=Stats)
    num_prefilled: int = 0
    num_known: int = 0  # tokens of the prompt that are the text of earlier turns
    on_prefill: Callable[[int], None] | None = None  # told how much of the prompt has been read
    has_warned: bool = False
    _num_before: int | None = None  # tokens known when the last pass began

    @property
    def num_cached(self) -> int:
        """Tokens, from the prompt's first on, that both caches hold with what followed them."""
        known = len(self.request.prompt_ids)
        if self._num_before is None:
            return min(self.num_prefilled, known - 1)
        return known + self._num_before - 1

    def end_of_pass(self, most_rows: int) -> int:
        """Where the next pass over the prompt ends, which takes at most `most_rows` tokens.

        Rows of earlier turns that run again, a few more with a draft than without, were decoded:
        they do not become part of a new prompt that is long enough for another arithmetic.
        """
        start = self.num_prefilled
        end = min(start + most_rows, len(self.request.prompt_ids))
        is_apart = start < self.num_known < end and quantises_rows(end - start)
        return self.num_known if is_apart else end

    def keep(self, run: list[int]) -> Burst:
        """The part of an accepted run, its bonus token last, that is output.

        A bonus token of -1 stands for logits that are no distribution: the text ends there.
        """
        self._num_before = len(self.tokens)
        chosen = run if run[-1] >= 0 else run[:-1]
        kept, self.finish_reason = self.request.ends.cut(self.tokens, chosen)
        self.tokens += kept
        self.stats.num_tokens = len(self.tokens)
        if chosen is not run and self.finish_reason is None:
            self.finish_reason = "error"
            self.error = (
                "no token can be chosen for position "
                f"{len(self.request.prompt_ids) + len(self.tokens)}: the target's logits there "
                "contain NaN or +inf, or all are -inf"
            )
        return Burst(tuple(kept), min(len(kept), len(run) - 1))


def _token_limit(max_new_tokens: int | None, sampling: SamplingParams) -> int:
    limits = [limit for limit in (max_new_tokens, sampling.max_tokens) if limit is not None]
    if not limits:
        raise ValueError("max_new_tokens: give it, or max_tokens in the sampling parameters")
    return min(limits)


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
    outside = [token for token in prompt_ids if not _is_id(token, vocab_size)]
    if outside:
        raise ValueError(f"prompt_ids: must lie in 0..{vocab_size - 1}, got {outside[:5]}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")


def _is_id(token: Any, vocab_size: int) -> bool:
    """Rows of arrays have `__index__` too, and refuse when they are asked."""
    try:
        return 0 <= operator.index(token) < vocab_size
    except TypeError:
        return False


def _check_images(
    images: ImageFeatures, prompt_ids: Sequence[int], target: Llama4ForCausalLM
) -> None:
    """Raises ValueError for image rows that prompt or target cannot take."""
    width = target.config.hidden_size
    if images.rows_FD.shape[1] != width:
        raise ValueError(f"images: rows must be {width} wide, got {images.rows_FD.shape[1]}")
    if images.positions and images.positions[-1] >= len(prompt_ids):
        raise ValueError(
            f"images: reach position {images.positions[-1]} of a prompt of {len(prompt_ids)} tokens"
        )


def check_draft_takes_images(draft: Eagle3Llama4ForCausalLM, target: Llama4ForCausalLM) -> None:
    """Raises ValueError for a draft that image features of the target do not fit."""
    width = target.config.hidden_size
    if draft.config.draft_multimodal != "text" and draft.config.hidden_size != width:
        raise ValueError(
            f"draft: of width {draft.config.hidden_size}, cannot take image features of the "
            f'target\'s {width}; load it with "draft_multimodal": "text"'
        )
