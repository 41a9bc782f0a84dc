"""Tokens as they come: what iterating over running requests yields, and what is left at the end."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from aerie.eagle3.ends import FinishReason
from aerie.eagle3.engine import Engine
from aerie.eagle3.sequences import Burst, Decoded
from aerie.eagle3.stats import Stats


class Stream:
    """Several prompts decoded together. Iterating yields (number of the prompt, burst).

    A prompt whose logits become no distribution ends with the reason "error"; the others go on.
    """

    def __init__(self, engine: Engine, decoded: Sequence[Decoded]) -> None:
        self.engine, self.decoded = engine, list(decoded)
        self._is_started = False

    @torch.inference_mode()
    def __iter__(self) -> Generator[tuple[int, Burst], None, None]:
        """Closing the iterator between two bursts cancels what is left and frees its pages."""
        if self._is_started:
            raise ValueError("decoding: a Decoding is iterated once; build another one")
        self._is_started = True
        numbers = {id(decoded): number for number, decoded in enumerate(self.decoded)}
        try:
            while self.engine.has_work:
                for decoded, burst in self.engine.step():
                    yield numbers[id(decoded)], burst
        finally:
            for number in range(len(self.decoded)):
                self.cancel(number)

    def cancel(self, number: int) -> None:
        """Ends one of the prompts between two bursts; its pages are free."""
        self.engine.cancel(self.decoded[number])


class SingleStream:
    """One prompt's side of a `Stream`. Iterating yields its bursts."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        (self.decoded,) = stream.decoded

    @property
    def tokens(self) -> list[int]:
        return self.decoded.tokens

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.decoded.finish_reason

    @property
    def stats(self) -> Stats:
        return self.decoded.stats

    @property
    def seed(self) -> int | None:
        """Repeats a sampled run."""
        return self.decoded.request.reported_seed

    def __iter__(self) -> Generator[Burst, None, None]:
        """Closing the iterator between two bursts cancels the rest and frees its pages.

        Raises FloatingPointError where the target's logits are no distribution.
        """
        bursts = iter(self.stream)
        try:
            for _, burst in bursts:
                yield burst
        finally:
            bursts.close()
        if self.decoded.error is not None:
            raise FloatingPointError(self.decoded.error)


@dataclass(frozen=True)
class Generation:
    """`tokens` after the prompt, the end token included; why it stopped; what it took.

    A sampled run is repeated by its `seed`. `error` belongs to the reason "error".
    """

    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    seed: int | None = None
    error: str | None = None

    @classmethod
    def of(cls, decoded: Decoded) -> "Generation":
        assert decoded.finish_reason is not None
        seed = decoded.request.reported_seed
        return cls(decoded.tokens, decoded.finish_reason, decoded.stats, seed, decoded.error)
