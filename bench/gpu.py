"""`make gpu`: all that needs a GPU, in one command and within nine minutes; nothing is downloaded.

    python -m bench.gpu [--small] [--seconds N] [--commit SHA]

1. the two ceilings and the cost of a launch
2. the tests marked `gpu`: real shapes, bfloat16 and FP8, captured graphs
3. every kernel 100 times with equal bits, then beside its reference, torch.compile and the peers
   that are installed
4. Scout's 48 layers with random FP8 weights (`bench/scout.py`)
5. compute-sanitizer's memcheck and racecheck over small shapes, where it is installed
6. the rows into bench/results/<device>.json, the tables into README.md

Needs torch, triton, transformers and pytest. Every step is a process with a limit of its own out of
what is left; one that fails is named in the end, and the others still run. `--small` runs the same
steps with what a CPU can do and writes neither results nor README.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

from bench.environment import ROOT

SECONDS = 530.0
SANITIZED = "tests/kernels/test_tree_attention.py"
SANITIZED_CASES = "test_chain and causal and 8"
RACES = "tests/kernels/test_linear.py"
RACES_CASES = "test_any_split_of_the_depth"


@dataclass(frozen=True)
class Task:
    """One step; `most` seconds of those that are left, `why_not` where it cannot run here."""

    name: str
    command: tuple[str, ...]
    most: float
    why_not: str = ""


def pytest_command(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def bench_command(saved: Path, small: bool, commit: str | None) -> tuple[str, ...]:
    """All kernel benches; on a bare machine what pytest-benchmark would do is `plain_benchmark`."""
    stand_in = () if find_spec("pytest_benchmark") else ("-p", "bench.plain_benchmark")
    what = ("bench/kernels/swiglu.py",) if small else ("bench",)
    named = ("--commit", commit) if commit else ()
    command = (sys.executable, "-m", "pytest", "-q", "-rs", *stand_in, *what)
    return (*command, f"--benchmark-json={saved}", *named)


def sanitizer_command(tool: str, test: str, cases: str) -> tuple[str, ...]:
    head = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
    return (*head, *pytest_command("-x", test, "-k", cases))


def tasks(folder: Path, small: bool, commit: str | None = None) -> list[Task]:
    """The steps in order; what they save lies in `folder`."""
    python, saved, scout = sys.executable, folder / "last.local.json", folder / "scout.local.json"
    missing = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not installed"
    size = ("--small",) if small else ()
    keep = () if small else ("--merge", "--scout", str(scout), "--readme")
    tests = pytest_command("-m", "gpu", "tests/kernels/test_linear.py" if small else "tests")
    report = (python, "-m", "bench.report", str(saved), *keep)
    model = (python, "-m", "bench.scout", *size, "--seconds", "60", "--json", str(scout))
    return [
        Task("ceilings", (python, "-m", "bench.ceilings"), 30),
        Task("tests", tests, 150),
        Task("kernels", bench_command(saved, small, commit), 190),
        Task("Scout's shape", model, 120),
        Task(
            "memcheck",
            sanitizer_command("memcheck", SANITIZED, SANITIZED_CASES),
            60,
            why_not=missing,
        ),
        Task("racecheck", sanitizer_command("racecheck", RACES, RACES_CASES), 60, why_not=missing),
        Task("report", report, 20),
    ]


def run(task: Task, left: float) -> str:
    """What became of a step: "ok", or why not."""
    if task.why_not:
        return f"skipped: {task.why_not}"
    limit = min(task.most, left)
    if limit <= 1:
        return "skipped: no time left"
    print(f"== {task.name} (at most {limit:.0f} s): {' '.join(task.command)}", flush=True)
    try:
        done = subprocess.run(task.command, cwd=ROOT, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"failed: not done after {limit:.0f} s"
    return "ok" if done.returncode == 0 else f"failed: exit code {done.returncode}"


def run_all(found: Sequence[Task], seconds: float) -> dict[str, str]:
    """The steps in order; the last, the report, keeps its time whatever the others take."""
    end, outcomes = monotonic() + seconds, {}
    for task in found:
        kept = 0 if task is found[-1] else found[-1].most
        start = monotonic()
        outcome = run(task, end - start - kept)
        outcomes[task.name] = f"{outcome} ({monotonic() - start:.0f} s)"
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--commit", help="commit to write into the rows of a copy without git")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.small else ROOT / "bench" / "results"
        found = tasks(folder, options.small, options.commit)
        outcomes = run_all(found, options.seconds)
    print("\n".join(f"{name:14} {outcome}" for name, outcome in outcomes.items()))
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
