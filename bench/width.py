"""`python -m bench.width`: what cost-aware width is worth at Llama 4's sizes. SIMULATED.

Recorded chains of the embedded pair (`bench.traces`) are replayed round by round; the time of a
round comes from rooflines of an H200, not from a run. So the acceptance is that of a small model
and the speed that of an ideal kernel; what is tested is the choice. Compared are fixed chains of 0
to 8 tokens (0 drafts nothing) and `aerie.eagle3.width`, which knows the table of times and sees
only what a draft sees.

Assumptions: FP8 weights and a bf16 head; routing uniform and independent, as in the cost model of
the literature, so that T rows read E (1 - (1 - 1/E)^T) experts of a layer; 2048 tokens of bfloat16
keys and values per sequence; Scout on one GPU, Maverick on eight with 96 all-reduces of 6.5 us and
a draft on each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import exp
from statistics import harmonic_mean

from aerie.eagle3.width import Experience, RoundCosts, worth_deepening, worth_verifying
from bench.traces import DEPTH, Start, read_traces

BYTES_PER_S, FLOP_PER_S = 4.3e12, 1.45e15  # copy bandwidth; FP8 products
EXPERT = 3 * 5120 * 8192  # weights, a byte each
ATTENTION, DENSE = 48 * 62.9e6, 24 * 251.7e6
HEAD = 202048 * 5120 * 2  # bytes
ACTIVE = 17e9  # weights a token is multiplied by
CONTEXT_BYTES = 2048 * 48 * 4096
DRAFT_LEVEL_MS = (451e6 + 328e6) / BYTES_PER_S * 1e3  # layer and a head of 32k ids, bfloat16


@dataclass(frozen=True)
class Served:
    """A target on its GPUs; bytes and weights are those of one GPU."""

    name: str
    num_experts: int
    expert_bytes: float  # one expert of every layer that has experts
    other_bytes: float
    num_gpus: int = 1
    fixed_ms: float = 0.0

    def verify_ms(self, rows: int, num_sequences: int) -> float:
        """The roofline of a pass: bytes or products, whichever takes longer, and what is fixed."""
        touched = self.num_experts * (1 - (1 - 1 / self.num_experts) ** rows)
        context = num_sequences * CONTEXT_BYTES / self.num_gpus
        read = (self.other_bytes + touched * self.expert_bytes + context) / BYTES_PER_S
        multiply = 2 * ACTIVE / self.num_gpus * rows / FLOP_PER_S
        return 1e3 * max(read, multiply) + self.fixed_ms

    def costs(self, num_sequences: int) -> RoundCosts:
        rows = {1, *range(num_sequences, num_sequences * (1 + DEPTH) + 1)}
        return RoundCosts({n: self.verify_ms(n, num_sequences) for n in rows}, DRAFT_LEVEL_MS)


SCOUT = Served("Scout, 1 H200", 16, 48 * EXPERT, ATTENTION + 48 * EXPERT + HEAD)
MAVERICK = Served(
    "Maverick, 8 H200",
    128,
    24 * EXPERT / 8,
    (ATTENTION + DENSE + 24 * EXPERT + HEAD) / 8,
    num_gpus=8,
    fixed_ms=96 * 6.5e-3,
)


@dataclass(frozen=True)
class Scenario:
    target: Served
    batch: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.target.name}, batch {self.batch}, temperature {self.temperature:g}"


MIX = [
    Scenario(target, batch, temperature)
    for target in (SCOUT, MAVERICK)
    for batch in (1, 4, 16, 64)
    for temperature in (0.0, 1.0)
]


class Fixed:
    """Every chain `length` long."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, starts: Sequence[Start]) -> tuple[int, list[int]]:
        """Levels to draft, and how many tokens of each chain to verify."""
        return self.length, [self.length] * len(starts)

    def observe(self, starts: Sequence[Start], levels: int, counts: list[int], got: int) -> None:
        """Nothing to learn."""


class CostAware:
    """The rule under test. It reads a level of the recorded scores only once it drafts it."""

    def __init__(self, costs: RoundCosts, batch: int) -> None:
        self.costs, self.batch = costs, batch
        self.experience = Experience(costs, batch)

    def choose(self, starts: Sequence[Start]) -> tuple[int, list[int]]:
        levels = [self._gains(starts, 0)]
        while len(levels) < DEPTH and self._goes_on(levels):
            levels.append(self._gains(starts, len(levels)))
        ranked = sorted(((g, i) for level in levels for i, g in enumerate(level)), reverse=True)
        gains = [gain for gain, _ in ranked]
        count = worth_verifying(gains, self.costs, self.experience.rate, self.batch)
        chosen = [i for _, i in ranked[:count]]
        return len(levels), [chosen.count(i) for i in range(self.batch)]

    def observe(self, starts: Sequence[Start], levels: int, counts: list[int], got: int) -> None:
        pairs = list(zip(starts, counts, strict=True))
        verified = [exp(score) for start, count in pairs for score in start.scores[:count]]
        best = [max(exp(start.scores[level]) for start in starts) for level in range(levels)]
        self.experience.observe(verified, best, got)

    def _gains(self, starts: Sequence[Start], level: int) -> list[float]:
        return [self.experience.gain(exp(start.scores[level])) for start in starts]

    def _goes_on(self, levels: list[list[float]]) -> bool:
        flat = [gain for level in levels for gain in level]
        left, fall, rate = DEPTH - len(levels), self.experience.fall, self.experience.rate
        return worth_deepening(flat, levels[-1], left, fall, self.costs, rate, self.batch)


def simulated_tokens_per_ms(scenario: Scenario, policy: Fixed | CostAware, rounds: int) -> float:
    """Every sequence goes its own way through the recorded texts, `rounds` long."""
    starts, batch = read_traces(scenario.temperature), scenario.batch
    at = [sequence * len(starts) // batch for sequence in range(batch)]
    costs = scenario.target.costs(batch)
    tokens = ms = 0.0
    for _ in range(rounds):
        here = [starts[place % len(starts)] for place in at]
        levels, counts = policy.choose(here)
        accepted = [min(s.accepted, count) for s, count in zip(here, counts, strict=True)]
        policy.observe(here, levels, counts, sum(accepted))
        at = [place + n + 1 for place, n in zip(at, accepted, strict=True)]
        tokens += batch + sum(accepted)
        ms += costs.verify(batch + sum(counts)) + levels * costs.draft_level_ms
    return tokens / ms


@dataclass(frozen=True)
class Compared:
    """Speed of fixed chains of 0, 1, ... tokens and of the rule, tokens per simulated ms."""

    fixed: tuple[float, ...]
    cost_aware: float

    @property
    def over_best(self) -> float:
        return self.cost_aware / max(self.fixed)


@cache
def compared(scenario: Scenario) -> Compared:
    rounds = max(60, 900 // scenario.batch)
    rule = CostAware(scenario.target.costs(scenario.batch), scenario.batch)
    fixed = [simulated_tokens_per_ms(scenario, Fixed(n), rounds) for n in range(DEPTH + 1)]
    return Compared(tuple(fixed), simulated_tokens_per_ms(scenario, rule, rounds))


def on_the_mix(scenarios: Sequence[Scenario]) -> Compared:
    """Speed over plain decoding where every scenario's plain run would take equally long work:
    the harmonic mean, as of equal shares of tokens."""
    each = [compared(scenario) for scenario in scenarios]
    fixed = [harmonic_mean([c.fixed[n] / c.fixed[0] for c in each]) for n in range(DEPTH + 1)]
    return Compared(tuple(fixed), harmonic_mean([c.cost_aware / c.fixed[0] for c in each]))


def main() -> None:
    print("SIMULATED from rooflines and recorded chains of the embedded pair; speed over plain")
    print(f"{'':43}" + "".join(f"  k={n}  " for n in range(DEPTH + 1)) + "aware  aware / best")
    for name, result in [*((str(s), compared(s)) for s in MIX), ("the mix", on_the_mix(MIX))]:
        speeds = [speed / result.fixed[0] for speed in (*result.fixed, result.cost_aware)]
        print(f"{name:43}" + "".join(f"{x:6.2f}" for x in speeds) + f"{result.over_best:10.3f}")


if __name__ == "__main__":
    main()
