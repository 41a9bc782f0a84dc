"""What a request asks of the choice of its tokens, under the names of vLLM and transformers.

The rule that turns logits into a token, the same at every position, with or without a draft:

    1. logit_bias is added; bad words and, before min_tokens, all end tokens become -inf
    2. repetition, then frequency and presence penalties
    3. the logits processors, in their order
    4. temperature 0: the largest logit. Otherwise temperature, top-k, top-p of what top-k keeps,
       min-p, and a draw with the noise of (seed, position)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

LEAST_TEMPERATURE = 1e-5  # below it is greedy, as in vLLM: 1 / temperature must stay harmless
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # (input_ids [T, S], scores [T, V]) -> scores


@dataclass(frozen=True)
class SamplingParams:
    """Greedy unless a temperature is given; every limit and penalty is off by default.

    `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `seed` None takes one from torch's global
    generator. The repetition penalty counts prompt and output, frequency and presence the output.
    `bad_words_ids` are sequences of ids that must not appear, `stop_token_ids` end the text as an
    end token does, `stop` are strings that end it (the tokens stay, the text is cut before).
    `logits_processors` are called as transformers calls its own, with whole prefixes; they must
    depend on nothing but their arguments. Raises ValueError naming the value that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop))
        self._check_numbers()
        self._check_lists()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)

    def with_seed_after(self, number: int) -> "SamplingParams":
        """For request `number` of several: a given seed, plus the number."""
        if self.seed is None:
            return self
        return replace(self, seed=(self.seed + number + 2**63) % 2**64 - 2**63)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError for an id that the target does not have."""
        words = [token for word in self.bad_words_ids for token in word]
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("bad_words_ids", words),
            ("stop_token_ids", self.stop_token_ids),
        ):
            outside = [token for token in ids if not 0 <= token < vocab_size]
            if outside:
                raise ValueError(f"{name}: ids must lie in 0..{vocab_size - 1}, got {outside[:5]}")

    def _check_numbers(self) -> None:
        number, whole = _check_number, _check_whole
        number("temperature", self.temperature, 0, math.inf)
        number("top_p", self.top_p, 0, 1, above_low=True)
        number("min_p", self.min_p, 0, 1)
        number("repetition_penalty", self.repetition_penalty, 0, math.inf, above_low=True)
        number("presence_penalty", self.presence_penalty, -2, 2)
        number("frequency_penalty", self.frequency_penalty, -2, 2)
        whole("top_k", self.top_k, -1, 2**31 - 1)
        whole("min_tokens", self.min_tokens, 0, math.inf)
        if self.seed is not None:
            whole("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            whole("max_tokens", self.max_tokens, max(1, self.min_tokens), math.inf)

    def _check_lists(self) -> None:
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop: must be non-empty strings, got {self.stop!r}")
        if not all(len(word) > 0 for word in self.bad_words_ids):
            raise ValueError("bad_words_ids: must be non-empty sequences of ids, got an empty one")
        words = [token for word in self.bad_words_ids for token in word]
        for token in (*self.logit_bias, *words, *self.stop_token_ids):
            _check_whole("logit_bias, bad_words_ids, stop_token_ids", token, 0, 2**31 - 1)
        for token, bias in self.logit_bias.items():
            _check_number(f"logit_bias[{token}]", bias, -100, 100)
        for processor in self.logits_processors:
            if not callable(processor):
                raise ValueError(f"logits_processors: must be callable, got {processor!r}")


def _check_number(
    name: str, value: Any, low: float, high: float, *, above_low: bool = False
) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{name}: must be a finite number, got {value!r}")
    if not low <= value <= high or (above_low and value == low):
        raise ValueError(
            f"{name}: must be in {'(' if above_low else '['}{low}, {high}], got {value!r}"
        )


def _check_whole(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: must be an integer in [{low}, {high}], got {value!r}")
