"""Where a text ends: end tokens, stop tokens, stop strings, token limit, context.

A run of accepted tokens is cut behind the first token that ends the text, wherever in the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "context", "error"]
Detokenize = Callable[[Sequence[int]], str]
SLACK = 16  # tokens without text of their own that a stop string may be interspersed with


@dataclass(frozen=True)
class Ends:
    """The ends of one request; lengths count tokens."""

    eos_token_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    stop: tuple[str, ...]
    min_tokens: int
    max_tokens: int
    prompt_length: int
    context: int
    detokenize: Detokenize | None = None

    def __post_init__(self) -> None:
        if self.stop and self.detokenize is None:
            raise ValueError(
                "stop: strings are found in text; pass detokenize, a function from ids to text"
            )

    def cut(
        self, tokens: Sequence[int], run: Sequence[int]
    ) -> tuple[list[int], FinishReason | None]:
        """What of `run` belongs to the text behind `tokens`, and why the text ends there, if so."""
        known = list(tokens)
        for number, token in enumerate(run, start=1):
            known.append(token)
            reason = self._reason(known)
            if reason is not None:
                return list(run[:number]), reason
        return list(run), None

    def _reason(self, tokens: list[int]) -> FinishReason | None:
        if len(tokens) >= self.min_tokens:
            if tokens[-1] in self.eos_token_ids:
                return "eos"
            if tokens[-1] in self.stop_token_ids or self._ends_in_stop(tokens):
                return "stop"
        if len(tokens) == self.max_tokens:
            return "length"
        if self.prompt_length + len(tokens) == self.context:
            return "context"
        return None

    def _ends_in_stop(self, tokens: list[int]) -> bool:
        """Whether the last token completes a stop string: only the end of the text is looked at."""
        if not self.stop or self.detokenize is None:
            return False
        window = tokens[-SLACK - max(len(text.encode()) for text in self.stop) :]
        with_last, without = self.detokenize(window), self.detokenize(window[:-1])
        return any(with_last.count(text) > without.count(text) for text in self.stop)
