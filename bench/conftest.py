"""Collection and the `measure` fixture of the kernel benchmarks.

`pytest bench` collects every file under `bench/kernels/` and `bench/generate.py`; the functions in
them are called `bench_*`. On a CPU only the eager references are timed: the interpreter checks a
kernel's arithmetic, and its run time says nothing about the kernel.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton

from bench.timer import Work, device_microseconds

BENCH = Path(__file__).parent
NOT_BENCHES = {"conftest.py", "timer.py", "report.py"}


def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    is_bench = file_path.suffix == ".py" and file_path.name not in NOT_BENCHES
    if is_bench and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is served; float32 on the CPU, where the eager references are used."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def environment(device: torch.device) -> dict[str, str]:
    """What every row carries beside its numbers."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=BENCH, capture_output=True, text=True
    ).stdout.strip()
    name = torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return {"device": name, "versions": versions, "commit": commit or "not a checkout"}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else 'unknown CPU'}, {torch.get_num_threads()} threads"


@pytest.fixture
def measure(benchmark, device: torch.device, environment: dict[str, str]):
    """`measure(provider, work, op, *args)` times `op(*args)` and books its work and versions."""

    def run(provider: str, work: Work, op: Callable, *args) -> None:
        if provider == "triton" and device.type != "cuda":
            pytest.skip("the interpreter's run time says nothing about the kernel")
        benchmark.extra_info |= environment | {"bytes": work.bytes, "flops": work.flops}
        if device.type == "cuda":
            benchmark.extra_info["device_us"] = device_microseconds(lambda: op(*args))
        benchmark.pedantic(_synchronised(op, device), args=args, rounds=20, warmup_rounds=3)

    return run


def _synchronised(op: Callable, device: torch.device) -> Callable:
    if device.type != "cuda":
        return op

    def call(*args) -> None:
        op(*args)
        torch.cuda.synchronize()

    return call
