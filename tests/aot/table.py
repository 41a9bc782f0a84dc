"""Runs the compilations of all targets, two processes at a time, and renders `aot.md`."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "results" / "aot.md"
WORKERS = 2
SLOWEST_FIRST = ("sm_90", "sm_100", "gfx942", "sm_80")
HEADER = """\
# Ahead-of-time evidence

Written by `python -m tests.aot --write`; `tests/test_ahead_of_time.py` fails when it is stale.
Every variant that the launch rules choose, by dtype (`fp8`: bfloat16 rows and FP8 weights) and
rows, is compiled without a GPU and its machine code is read: all for sm_90; bfloat16 and, but for
sm_80, FP8 for the others. Nothing here was run, and no time was measured.

Compiled with Triton {version}. Registers and instructions depend on that version.

Cells: registers per thread (gfx942: VGPRs), shared memory, tensor-core instructions, and loads from
global memory that are 128 bits wide or bulk, of all such loads. Counts are of the code, not of its
run. Several variants of one line stand in the order of the calls in `tests/aot/calls.py`. `!` marks
a rule that is broken under a named exception (`tests/aot/rules.py`).
"""
COLUMNS = ("sm_80", "sm_90", "sm_100", "gfx942")


def compiled(targets: Sequence[str] = SLOWEST_FIRST, only: str = "") -> list[dict]:
    """The facts of every variant for `targets`, compiled in processes of their own.

    `only` leaves out the ops whose name does not contain it.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        return [row for rows in pool.map(_compiled, targets, [only] * len(targets)) for row in rows]


def _compiled(target: str, only: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",  # its default changes between versions
    }
    command = [sys.executable, "-m", "tests.aot", target, only]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{target}: {result.stderr[-3000:]}"
    return [json.loads(line) for line in result.stdout.splitlines()]


def rendered(rows: list[dict]) -> str:
    """The table: one line per kernel, dtype and size class, one column per target."""
    cells: dict[tuple, dict[str, list[str]]] = {}
    for row in rows:
        line = (row["kernel"], row["kind"], min(row["rows"]), row_range(row["rows"]))
        cells.setdefault(line, {}).setdefault(row["target"], []).append(cell(row))
    head = ("kernel", "dtype", "rows", *COLUMNS)
    lines = [head, ("---",) * len(head)]
    for line in sorted(cells):
        by_target = [" / ".join(cells[line].get(target, ["-"])) for target in COLUMNS]
        lines.append((line[0], line[1], line[3], *by_target))
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{HEADER.format(version=triton.__version__)}\n{table}\n"


def row_range(rows: list[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{min(rows)}-{max(rows)}"


def cell(row: dict) -> str:
    units = [f"{count} {unit}" for unit, count in row["matrix"].items()] or ["-"]
    shared = f"{row['shared'] / 1024:.0f}K" if row["shared"] >= 1024 else f"{row['shared']}B"
    parts = [str(row["registers"]), shared, *units, f"{row['wide_loads']} of {row['loads']}"]
    return ", ".join(parts) + " !" * bool(row["broken"])


def described(row: dict) -> str:
    """One variant as a line for a reader who works on its kernel."""
    spills = f", {row['spills']} spills" * bool(row["spills"])
    broken = f"  BREAKS {', '.join(row['broken'])}" * bool(row["broken"])
    offsets = "".join(f"\n    {line}" for line in row["narrow_offsets"])
    name = f"{row['target']:7} {row['kernel']} {row['kind']} {row_range(row['rows'])}"
    return f"{name}: {cell(row).removesuffix(' !')}{spills}{broken}{offsets}"


def recorded_version(text: str) -> str:
    match = re.search(r"Compiled with Triton (\S+?)\. ", text)
    return match[1] if match else "none"


def labels(text: str) -> list[tuple[str, ...]]:
    """Kernel, dtype and rows of every line: what no version of Triton changes."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| _")]
    return [tuple(row[:3]) for row in rows]
