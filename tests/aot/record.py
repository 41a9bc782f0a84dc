"""Facts of every variant, kept in the repository under a fingerprint of what was compiled.

A fingerprint is of the intermediate code that a kernel and its launch rule give (Triton's, before
the first pass, without line numbers), the compiler's options and target, its version, and how the
machine code is read. Where it is the same, the machine code is: compiling again can only show that
the record is false, and a sample of every sixteenth variant, another one every day, looks for that.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import triton

if TYPE_CHECKING:
    from tests.aot.proof import Row

RECORD = Path(__file__).parents[2] / "bench" / "results" / "aot.json"
DAYS = 16  # in which every variant is compiled once


@dataclass(frozen=True)
class Record:
    """Facts by target and fingerprint, and the version of Triton that they are of."""

    version: str
    facts: dict[str, dict[str, dict]] = field(default_factory=dict)

    @property
    def is_current(self) -> bool:
        return self.version == triton.__version__

    @classmethod
    def read(cls) -> "Record":
        if not RECORD.exists():
            return cls(triton.__version__)
        content = json.loads(RECORD.read_text())
        return cls(content["triton"], content["facts"])

    @classmethod
    def of(cls, rows: Sequence["Row"]) -> "Record":
        record = cls(triton.__version__)
        for row in rows:
            record.facts.setdefault(row.target, {})[row.fingerprint] = row.facts
        return record

    def write(self) -> None:
        targets = []
        for target, facts in sorted(self.facts.items()):
            lines = [f'"{key}": {json.dumps(facts[key])}' for key in sorted(facts)]
            targets.append(f'"{target}": {{\n' + ",\n".join(lines) + "\n}")
        body = ",\n".join(targets)
        RECORD.write_text(f'{{"triton": "{self.version}", "facts": {{\n{body}\n}}}}\n')


def is_due(fingerprint: str, day: int) -> bool:
    """Whether a variant is in the sample that is compiled on `day`."""
    return int(fingerprint, 16) % DAYS == day % DAYS


def differences(rows: Sequence["Row"]) -> list[str]:
    """Where the record lacks a variant, holds one too many, or holds other facts."""
    known = Record.read()
    if not known.is_current:
        return []
    found = []
    for row in rows:
        label = f"{row.target} {row.kernel} {row.kind} {row.rows}"
        if row.recorded is None:
            found.append(f"{label}: not recorded")
        elif row.recorded != row.facts:
            found.append(f"{label}: {row.facts} instead of {row.recorded}")
    compiled = {(row.target, row.fingerprint) for row in rows}
    recorded = {(target, key) for target, facts in known.facts.items() for key in facts}
    return found + [f"{target} {key}: no launch asks for it" for target, key in recorded - compiled]
