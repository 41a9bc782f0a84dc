"""What the benches use of pytest-benchmark, for a machine that has pytest alone.

pytest -p bench.plain_benchmark bench ...
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest

RAN = pytest.StashKey[list]()


class Hooks:
    @pytest.hookspec
    def pytest_benchmark_update_json(self, config, benchmarks, output_json):
        """As pytest-benchmark's."""


@dataclass
class Benchmark:
    """One benchmark's times and notes."""

    name: str
    seconds: list[float] = field(default_factory=list)
    extra_info: dict = field(default_factory=dict)

    def pedantic(self, call: Callable, args=(), rounds: int = 1, warmup_rounds: int = 0):
        for _ in range(warmup_rounds):
            call(*args)
        result = None
        for _ in range(rounds):
            start = perf_counter()
            result = call(*args)
            self.seconds.append(perf_counter() - start)
        return result


def pytest_addhooks(pluginmanager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser) -> None:
    parser.addoption("--benchmark-json", type=Path, help="where the results go")


def pytest_configure(config) -> None:
    config.stash[RAN] = []


@pytest.fixture
def benchmark(request):
    mine = Benchmark(request.node.name)
    yield mine
    if mine.seconds:
        request.config.stash[RAN].append(mine)


def pytest_sessionfinish(session) -> None:
    path = session.config.getoption("--benchmark-json")
    if path is None:
        return
    ran = session.config.stash[RAN]
    entries = [
        {"name": b.name, "stats": {"median": median(b.seconds)}, "extra_info": b.extra_info}
        for b in ran
    ]
    output = {"benchmarks": entries}
    hook = session.config.hook.pytest_benchmark_update_json
    hook(config=session.config, benchmarks=ran, output_json=output)
    path.write_text(json.dumps(output, indent=1) + "\n")
