"""How deep to draft and how much to verify: what a round costs against what it brings.

A target with experts reads every expert that one of the rows is routed to: a pass grows with its
rows until it reads them all. So few nodes are worth verifying for one sequence, and many for a
large batch. With g_i the chance that node i is accepted, a round of m nodes brings one token a
sequence and g_1 + ... + g_m more, and the tokens per millisecond are most where every round has

    max over m of  g_1 + ... + g_m - rate * verify_ms(rows)

for `rate` their own mean (Dinkelbach 1967). `rate` is that of the rounds so far, and

    g_i = p_i ** exponent        p_i the draft's probability of the path to node i

A target that samples accepts about as often as the draft thinks (exponent near 1), a greedy one
more often (near 0.5): the exponent is followed by Newton steps towards the one under which the
rounds so far were expected to accept what they did accept. All of this is the draft's side and the
past, so the tokens stay the target's (`verify`). Pure functions and their memory; nothing here
touches a device.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

FIRST_EXPONENT, FIRST_FALL = 0.6, 0.8  # before anything is known; a hopeful fall explores
LEAST_EXPONENT = 0.1
PRIOR_NODES = 8  # what the first exponent and fall weigh, in nodes


@dataclass(frozen=True)
class RoundCosts:
    """Milliseconds of a target pass by its rows, the roots included, and of one drafted level.

    The keys of `verify_ms` are the size classes of a loop of fixed shapes: rows between two of them
    cost what the larger one does, and more rows than the largest are never verified.
    """

    verify_ms: Mapping[int, float]
    draft_level_ms: float = 0.0
    num_sequences: int = 1  # a row of each is plain decoding, the least that the table must hold
    sizes: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        name = "cost_aware_width"
        for rows, ms in self.verify_ms.items():
            if type(rows) is not int or rows < 1:
                raise ValueError(f"{name}: verify_ms: rows must be integers >= 1, got {rows!r}")
            _check_ms(f"{name}: verify_ms[{rows}]", ms, above=0)
        if self.num_sequences not in self.verify_ms:
            least = "1 row" if self.num_sequences == 1 else f"{self.num_sequences} rows"
            raise ValueError(f"{name}: verify_ms: needs the time of {least}, plain decoding")
        _check_ms(f"{name}: draft_level_ms", self.draft_level_ms, above=-1)
        object.__setattr__(self, "sizes", tuple(sorted(self.verify_ms)))

    def verify(self, rows: int) -> float:
        """Milliseconds of a pass of `rows`; infinite beyond the table."""
        at = bisect_left(self.sizes, rows)
        return self.verify_ms[self.sizes[at]] if at < len(self.sizes) else math.inf

    def for_rounds(self, num_sequences: int, num_rows: int) -> "RoundCosts | None":
        """Of so many sequences with up to `num_rows` rows each; None: the table does not reach."""
        is_covered = num_sequences == 1 or num_sequences * num_rows <= self.sizes[-1]
        return self if is_covered else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RoundCosts":
        """From JSON, whose keys are texts. Raises ValueError naming what is wrong."""
        unknown = [key for key in values if key not in ("verify_ms", "draft_level_ms")]
        table = values.get("verify_ms")
        if unknown or not isinstance(table, Mapping):
            raise ValueError(
                'cost_aware_width: must be "measured" or {"verify_ms": {"1": MS, ROWS: MS, ...}, '
                f'"draft_level_ms": MS}}, got {dict(values)!r}'
            )
        verify_ms = {int(key) if str(key).isdecimal() else key: ms for key, ms in table.items()}
        return cls(verify_ms, values.get("draft_level_ms", 0.0))


def worth_verifying(
    gains: Sequence[float], costs: RoundCosts, rate: float, num_sequences: int = 1
) -> int:
    """How many nodes to verify, of `gains` in falling order over all sequences together."""
    _, count = _best(gains, costs, rate, num_sequences)
    return count


def worth_deepening(
    gains: Sequence[float],
    frontier: Sequence[float],
    levels_left: int,
    fall: float,
    costs: RoundCosts,
    rate: float,
    num_sequences: int = 1,
) -> bool:
    """Whether another level, or several, would pay: each is expected to have the gains of the one
    above times `fall`. `gains` of all nodes so far, `frontier` of the last level's."""
    now, _ = _best(sorted(gains, reverse=True), costs, rate, num_sequences)
    expected, ahead = list(gains), list(frontier)
    for level in range(1, levels_left + 1):
        ahead = [fall * gain for gain in ahead]
        expected += ahead
        value, _ = _best(sorted(expected, reverse=True), costs, rate, num_sequences)
        if value - rate * level * costs.draft_level_ms > now:
            return True
    return False


def _best(
    gains: Sequence[float], costs: RoundCosts, rate: float, num_sequences: int
) -> tuple[float, int]:
    """The largest value of a round, and its number of nodes: a full size class, or all nodes."""
    sums = [0.0, *accumulate(gains)]
    full = {size - num_sequences for size in costs.sizes}
    counts = [0, *sorted(n for n in full if 0 < n < len(gains)), len(gains)]
    values = [(sums[n] - rate * costs.verify(num_sequences + n), -n) for n in counts]
    value, negative = max(values)
    return value, -negative


class Experience:
    """What the rounds so far say: tokens per millisecond, and how far to trust the draft."""

    def __init__(self, costs: RoundCosts, num_sequences: int = 1) -> None:
        self.rate = num_sequences / costs.verify(num_sequences)
        self.exponent = FIRST_EXPONENT
        self._costs, self._num_sequences = costs, num_sequences
        self._tokens = self._ms = 0.0
        self._slope = PRIOR_NODES * 0.5**FIRST_EXPONENT * math.log(2)
        self._above, self._below = float(PRIOR_NODES), PRIOR_NODES * FIRST_FALL

    @property
    def fall(self) -> float:
        """The gain of a level's best node over that of the level above."""
        return min(1.0, self._below / self._above)

    def gain(self, probability: float) -> float:
        return probability**self.exponent

    def observe(
        self, verified: Sequence[float], best_of_levels: Sequence[float], num_accepted: int
    ) -> None:
        """One round: the path probabilities of the nodes verified, and of each level's best."""
        rows = self._num_sequences + len(verified)
        self._tokens += self._num_sequences + num_accepted
        self._ms += self._costs.verify(rows) + len(best_of_levels) * self._costs.draft_level_ms
        self.rate = self._tokens / self._ms
        expected = sum(map(self.gain, verified))
        self._slope += sum(-math.log(p) * self.gain(p) for p in verified if p > 0)
        step = (expected - num_accepted) / self._slope
        self.exponent = max(LEAST_EXPONENT, self.exponent + step)
        gains = [self.gain(p) for p in best_of_levels]
        self._above, self._below = self._above + sum(gains[:-1]), self._below + sum(gains[1:])


def _check_ms(name: str, value: Any, above: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= above:
        raise ValueError(f"{name}: must be milliseconds, got {value!r}")
