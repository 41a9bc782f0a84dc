"""Renders `aot.md`, and single variants for a reader who works on a kernel."""

import re

import triton

from tests.aot.proof import ROOT, Row

TABLE = ROOT / "bench" / "results" / "aot.md"
HEADER = """\
# Ahead-of-time evidence

Written by `python -m tests.aot --write`; `tests/test_ahead_of_time.py` fails when it is stale.
Every variant that the launch rules choose, by dtype (`fp8`: bfloat16 rows and FP8 weights) and
rows, is compiled without a GPU and its machine code is read; sm_80 has no FP8. `aot.json` keeps the
facts by a fingerprint of what was compiled. Nothing here was run, and no time was measured.

Compiled with Triton {version}. Registers and instructions depend on that version.

Cells: registers per thread (gfx942: VGPRs), shared memory, tensor-core instructions, and loads from
global memory that are 128 bits wide or bulk, of all such loads. Counts are of the code, not of its
run. Several variants of one line stand in the order of the calls in `tests/aot/calls.py`. `!` marks
a rule that is broken under a named exception (`tests/aot/rules.py`).
"""
COLUMNS = ("sm_80", "sm_90", "sm_100", "gfx942")


def rendered(rows: list[Row]) -> str:
    """The table: one line per kernel, dtype and size class, one column per target."""
    cells: dict[tuple, dict[str, list[str]]] = {}
    for row in rows:
        line = (row.kernel, row.kind, min(row.rows), row_range(row.rows))
        cells.setdefault(line, {}).setdefault(row.target, []).append(cell(row))
    head = ("kernel", "dtype", "rows", *COLUMNS)
    lines = [head, ("---",) * len(head)]
    for line in sorted(cells):
        by_target = [" / ".join(cells[line].get(target, ["-"])) for target in COLUMNS]
        lines.append((line[0], line[1], line[3], *by_target))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{HEADER.format(version=triton.__version__)}\n{table}\n"


def row_range(rows: list[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{min(rows)}-{max(rows)}"


def cell(row: Row) -> str:
    if row.facts is None:
        return "?"
    units = [f"{count} {unit}" for unit, count in row.facts["matrix"].items()] or ["-"]
    size = row.facts["shared"]
    shared = f"{size / 1024:.0f}K" if size >= 1024 else f"{size}B"
    loads = f"{row.facts['wide_loads']} of {row.facts['loads']}"
    return ", ".join([str(row.facts["registers"]), shared, *units, loads]) + " !" * bool(row.broken)


def described(row: Row) -> str:
    """One variant as a line."""
    assert row.facts is not None
    spills = f", {row.facts['spills']} spills" * bool(row.facts["spills"])
    broken = f"  BREAKS {', '.join(row.broken)}" * bool(row.broken)
    offsets = "".join(f"\n    {line}" for line in row.facts["narrow_offsets"])
    name = f"{row.target:7} {row.kernel} {row.kind} {row_range(row.rows)}"
    return f"{name}: {cell(row).removesuffix(' !')}{spills}{broken}{offsets}"


def recorded_version(text: str) -> str:
    match = re.search(r"Compiled with Triton (\S+?)\. ", text)
    return match[1] if match else "none"


def labels(text: str) -> list[tuple[str, ...]]:
    """Kernel, dtype and rows of every line: what no version of Triton changes."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| _")]
    return [tuple(row[:3]) for row in rows]
