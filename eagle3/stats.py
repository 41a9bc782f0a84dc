"""What a generation did: passes, acceptance and time, in the field's own terms."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

DEAD_BELOW = 0.2  # first drafted tokens accepted; a draft below it costs more than it can bring
DEAD_AFTER = 32  # drafts; one that accepts half is called dead in 3 of 10000 runs


@dataclass(frozen=True)
class Round:
    """One round after the prompt: nodes verified, nodes accepted, milliseconds of its parts."""

    num_drafted: int
    num_accepted: int
    draft_ms: float
    verify_ms: float
    other_ms: float


@dataclass(frozen=True)
class BatchRound:
    """One round of several sequences, and the prompts read before it: milliseconds of its parts."""

    num_running: int
    prefill_ms: float
    draft_ms: float
    verify_ms: float
    other_ms: float


@dataclass
class Stats:
    """Counts and times of one generation, filled while it runs.

    A *draft* is one round that proposed tokens; acceptance is counted as verified, before an end
    token or a length limit cuts the run. Times are host clock: on a GPU, work launched
    asynchronously counts where the host waits for it, which is in verification. What the caller
    does between two bursts is in none of them.
    """

    num_tokens: int = 0
    num_target_passes: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    drafted_at: list[int] = field(default_factory=list)  # drafts that had a position i
    reached_at: list[int] = field(default_factory=list)  # ... and all positions before i accepted
    accepted_at: list[int] = field(default_factory=list)  # ... and position i too
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    total_ms: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)  # rounds by `Report.launched`
    _counted: tuple[int, int] | None = None  # drafted and accepted in the round under way
    _before: tuple[float, float, float] = (0.0, 0.0, 0.0)  # draft, verify, other up to it

    @classmethod
    def of_all(cls, parts: Iterable["Stats"]) -> "Stats":
        """Acceptance of several generations together, without their times."""
        result = cls()
        for part in parts:
            result.num_tokens += part.num_tokens
            result.num_target_passes += part.num_target_passes
            result.num_drafts += part.num_drafts
            result.num_draft_tokens += part.num_draft_tokens
            result._add_positions(len(part.drafted_at))
            for position in range(len(part.drafted_at)):
                result.drafted_at[position] += part.drafted_at[position]
                result.reached_at[position] += part.reached_at[position]
                result.accepted_at[position] += part.accepted_at[position]
        return result

    def count_draft(
        self, num_drafted: int, num_accepted: int, num_levels: int | None = None
    ) -> None:
        """Books one round. A tree has fewer positions than nodes: `num_levels`."""
        num_levels = num_drafted if num_levels is None else num_levels
        self.num_target_passes += 1
        self._counted = num_drafted, num_accepted
        if num_drafted == 0:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self._add_positions(num_levels)
        for position in range(num_levels):
            self.drafted_at[position] += 1
            self.reached_at[position] += position <= num_accepted
            self.accepted_at[position] += position < num_accepted

    def _add_positions(self, count: int) -> None:
        for counts in (self.drafted_at, self.reached_at, self.accepted_at):
            counts += [0] * (count - len(counts))

    @contextmanager
    def timed(self, part: Literal["prefill", "draft", "verify", "total"]) -> Iterator[None]:
        """Adds the block's duration to `part`."""
        start = time.perf_counter()
        yield
        elapsed = 1e3 * (time.perf_counter() - start)
        setattr(self, f"{part}_ms", getattr(self, f"{part}_ms") + elapsed)
        if part == "total":
            self.end_round()

    def end_round(self) -> None:
        """Books a round if `count_draft` counted one, with what the times have grown by since the
        round before: a loop calls this behind every step, once its times are added."""
        now = self.draft_ms, self.verify_ms, self.other_ms
        if self._counted is not None:
            grown = [after - before for after, before in zip(now, self._before, strict=True)]
            self.rounds.append(Round(*self._counted, *grown))
        self._before, self._counted = now, None

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.accepted_at)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verified draft, bonus token included; 1 without any draft."""
        if self.num_drafts == 0:
            return 1.0
        return 1 + self.num_accepted_tokens / self.num_drafts

    @property
    def tokens_per_target_pass(self) -> float:
        """The prompt's passes included."""
        return self.num_tokens / self.num_target_passes if self.num_target_passes else 0.0

    @property
    def acceptance_histogram(self) -> list[int]:
        """How many drafts had exactly 0, 1, 2, ... tokens accepted."""
        more = [self.num_drafts, *self.accepted_at, 0]
        return [at_least - above for at_least, above in pairwise(more)]

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the drafts in which position i was accepted (unconditional)."""
        return [a / n for a, n in zip(self.accepted_at, self.drafted_at, strict=True)]

    @property
    def conditional_acceptance_per_position(self) -> list[float]:
        """Share of the drafts accepted up to position i - 1 that were accepted at i too."""
        pairs = zip(self.accepted_at, self.reached_at, strict=True)
        return [accepted / reached if reached else 0.0 for accepted, reached in pairs]

    @property
    def is_at_the_floor(self) -> bool:
        """Whether enough drafts have been verified and hardly a first token was accepted."""
        return self.num_drafts >= DEAD_AFTER and self.acceptance_per_position[0] < DEAD_BELOW

    @property
    def other_ms(self) -> float:
        return self.total_ms - self.prefill_ms - self.draft_ms - self.verify_ms

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.num_tokens / self.total_ms if self.total_ms else 0.0
