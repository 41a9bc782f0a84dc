"""One run of the benches: which case a test belongs to, and the rows that come out.

Providers of a case are tests of their own, so that each can be chosen with `-k`; the last of them
times all together. A row exists for every provider, also for one that has no time.
"""

from dataclasses import dataclass, field
from functools import cached_property

import pytest
import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.compare import Contender, compare, with_rivals
from bench.copies import tensors
from bench.timer import Work
from bench.verdict import GREEN

INTERPRETED = "skipped: the interpreter's run time says nothing about the kernel"
COMPILED_ONCE = "skipped: a CPU compiles one case of an op, to save time"


def case_of(item: pytest.Item) -> tuple[str, str]:
    """Op and parameters of a test that uses `measure`; for another, its own name."""
    if not isinstance(item, pytest.Function) or "measure" not in item.fixturenames:
        return item.nodeid, ""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    named = {name: value for name, value in given.items() if name != "provider"}
    shown = ", ".join(f"{name}={value}" for name, value in sorted(named.items()))
    return item.originalname.removeprefix("bench_"), shown


def in_cases(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests with all providers of a case next to each other, else in their order."""
    order: dict[tuple[str, str], int] = {}
    for item in items:
        order.setdefault(case_of(item), len(order))
    return sorted(items, key=lambda item: order[case_of(item)])


@dataclass
class BenchSession:
    """Rows so far, and the providers of the current case that have come in."""

    device: torch.device
    environment: dict[str, str]
    verdicts: dict[str, str]  # by file stem
    rows: list[dict] = field(default_factory=list)
    waiting: dict[str, Contender | str] = field(default_factory=dict)
    infos: dict[str, dict] = field(default_factory=dict)

    @cached_property
    def ceilings(self) -> Ceilings:
        return measure_ceilings(self.device)

    def refusal(self, stem: str) -> str | None:
        verdict = self.verdicts.get(stem, "no test was run")
        return None if verdict == GREEN else f"refused: {verdict}"

    def enter(self, provider: str, contender: Contender, info: dict) -> str | None:
        """Notes a provider of the current case; returns why it will have no time, if so."""
        skipped = provider == "triton" and self.device.type != "cuda"
        self.waiting[provider] = INTERPRETED if skipped else contender
        self.infos[provider] = info
        return INTERPRETED if skipped else None

    def finish(self, case: tuple[str, str], work: Work, shapes: str) -> None:
        """Times all that came in, and their rivals; fills the rows and the tests' own notes."""
        known: dict[str, Contender | str] = dict(self.waiting)
        present = {name: c for name, c in known.items() if isinstance(c, Contender)}
        known |= with_rivals(case[0], present)
        if self.device.type == "cpu" and case[0] in {row["op"] for row in self.rows}:
            known["compile"] = COMPILED_ONCE
        self.waiting = {}
        for provider, numbers in compare(known, work, self.ceilings, self.device).items():
            self.book(case, provider, numbers | {"shapes": shapes})
            self.infos.get(provider, {}).update(self.rows[-1])

    def book(self, case: tuple[str, str], provider: str, numbers: dict) -> None:
        name = {"op": case[0], "case": case[1], "provider": provider}
        self.rows.append(name | numbers | self.environment)


def shapes_of(args: tuple) -> str:
    """Shapes and types of all tensors in `args`, as a row shows them."""
    return " ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors(args))
