"""An op is timed only if its correctness test is green for exactly this code.

The test file runs in a process of its own: under Triton's interpreter on a CPU, compiled on a GPU.
A verdict is remembered under a digest of the kernels and tests, so an edit asks again.
"""

import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from os import cpu_count
from typing import Protocol

import torch

from bench.environment import ROOT

IDENTITY = ("source", "versions", "device")
GREEN, NOTHING_COLLECTED = "green", 5


class Cache(Protocol):
    """pytest's cache, as much of it as is needed."""

    def get(self, key: str, default: object) -> object: ...

    def set(self, key: str, value: object) -> None: ...


def verdicts(
    ops: Iterable[str], device: torch.device, environment: dict[str, str], cache: Cache
) -> dict[str, str]:
    """ "green" or what is wrong, for the test file of every op; several run at a time.

    Only green is remembered: a red test is asked again.
    """
    names = sorted(set(ops))
    code = "/".join(sha256(environment[key].encode()).hexdigest()[:12] for key in IDENTITY)
    known = {op: cache.get(f"aerie/verdict/{code}/{op}", None) for op in names}
    unknown, workers = [op for op in names if known[op] != GREEN], max(1, min(8, cpu_count() or 1))
    groups = [unknown[i::workers] for i in range(min(workers, len(unknown)))]
    with ThreadPoolExecutor(workers) as pool:
        for answers in pool.map(lambda group: judged(group, device), groups):
            known |= answers
    for op in unknown:
        if known[op] == GREEN:
            cache.set(f"aerie/verdict/{code}/{op}", GREEN)
    return {op: str(verdict) for op, verdict in known.items()}


def judged(ops: list[str], device: torch.device) -> dict[str, str]:
    """Runs the test files of `ops` together, which is quicker, and one by one if one is red."""
    if len(ops) > 1 and run_tests(ops, device) == GREEN:
        return dict.fromkeys(ops, GREEN)
    return {op: run_tests([op], device) for op in ops}


def run_tests(ops: list[str], device: torch.device) -> str:
    """Runs the ops' test files, and on a GPU once more those marked for it alone."""
    paths = [ROOT / "tests" / "kernels" / f"test_{op}.py" for op in ops]
    if missing := [path for path in paths if not path.is_file()]:
        return f"no {missing[0].relative_to(ROOT)}"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += map(str, paths)
    verdict = _run(command)
    if verdict == GREEN and device.type == "cuda":
        verdict = _run([*command, "-m", "gpu"], nothing_is_fine=True)
    return verdict


def _run(command: list[str], nothing_is_fine: bool = False) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 or (nothing_is_fine and done.returncode == NOTHING_COLLECTED):
        return GREEN
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), "test red")
