"""Runs the compilations of all targets, two processes at a time."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORKERS = 2
SLOWEST_FIRST = ("sm_90", "sm_100", "gfx942", "sm_80")


@dataclass(frozen=True)
class Row:
    """One variant for one target. `facts` are those of `machine_code.Facts`, compiled just now or
    `recorded`; None if neither, which happens under another version of Triton only."""

    kernel: str
    kind: str
    rows: list[int]
    target: str
    fingerprint: str
    recorded: dict | None
    facts: dict | None

    @property
    def broken(self) -> list[str]:
        """The rules that it breaks."""
        from tests.aot.machine_code import Facts
        from tests.aot.rules import broken_rules

        return broken_rules(self.kernel, self.target, Facts(**self.facts)) if self.facts else []

    @property
    def unnamed(self) -> list[str]:
        """Those of them that no named exception covers."""
        from tests.aot.rules import EXCEPTED

        return [
            rule
            for rule in self.broken
            if not any(e.covers(self.kernel, rule, self.target, self.kind) for e in EXCEPTED)
        ]


def proven(how: str, only: str = "") -> list[Row]:
    """Every variant for every target; `only` leaves out the ops whose name does not contain it.

    `how` "all" compiles all of them, "due" those that the record lacks and the sample of today.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        parts = pool.map(lambda target: _proven(target, how, only), SLOWEST_FIRST)
        return [row for rows in parts for row in rows]


def _proven(target: str, how: str, only: str) -> list[Row]:
    return [Row(**json.loads(line)) for line in ran("-m", "tests.aot", target, how, only)]


def ran(*arguments: str) -> list[str]:
    """Lines that a Python with these arguments prints, in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",  # its default changes between versions
    }
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{arguments}: {result.stderr[-3000:]}"
    return result.stdout.splitlines()
