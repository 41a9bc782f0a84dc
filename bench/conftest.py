"""Collection and the `measure` fixture of the kernel benchmarks.

`pytest bench` collects every file under `bench/kernels/`, and `OTHERS`; the functions in them are
called `bench_*`. On a CPU only the references and their rivals are timed: the interpreter checks a
kernel's arithmetic, and its run time says nothing about the kernel.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.compare import Contender
from bench.environment import describe
from bench.session import BenchSession, case_of, in_cases, shapes_of
from bench.timer import Work
from bench.verdict import verdicts

BENCH = Path(__file__).parent
OTHERS = (BENCH / "generate.py", BENCH / "loading.py")
SESSION = pytest.StashKey[BenchSession]()
HOST_ROUNDS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--commit", help="commit to write into the rows of a copy without git")


def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    is_bench = file_path.parent == BENCH / "kernels" or file_path in OTHERS
    if is_bench and file_path.suffix == ".py" and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = in_cases(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Asks for the verdicts before any test's time limit runs."""
    config = session.config
    if config.option.collectonly:
        return
    assert config.cache is not None, "verdicts are kept in pytest's cache: leave its plugin on"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = describe(device, config.getoption("--commit"))
    measured = [i for i in session.items if "measure" in getattr(i, "fixturenames", ())]
    asked = verdicts((item.path.stem for item in measured), device, environment, config.cache)
    config.stash[SESSION] = BenchSession(device, environment, asked)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    """Adds the rows of all providers, also of those that pytest-benchmark did not time."""
    session = config.stash[SESSION]
    output_json["rows"] = session.rows
    if session.rows:
        output_json["ceilings"] = session.ceilings.as_dict() | session.environment


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest) -> BenchSession:
    return request.config.stash[SESSION]


@pytest.fixture(scope="session")
def device(bench_session: BenchSession) -> torch.device:
    return bench_session.device


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is served; float32 on the CPU, where the eager references are used."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@pytest.fixture(scope="session")
def environment(bench_session: BenchSession) -> dict[str, str]:
    """What every row carries beside its numbers."""
    return bench_session.environment


@pytest.fixture(autouse=True)
def _same_inputs_for_every_provider() -> None:
    torch.manual_seed(0)


@pytest.fixture
def measure(benchmark, request: pytest.FixtureRequest, bench_session: BenchSession):
    """`measure(provider, work, op, *args)` enters `op(*args)`; a case's last provider times all."""
    case = case_of(request.node)
    siblings = [item for item in request.session.items if case_of(item) == case]

    def run(provider: str, work: Work, op: Callable, *args) -> None:
        if reason := bench_session.refusal(request.path.stem):
            bench_session.book(case, provider, {"status": reason})
            pytest.skip(reason)
        skipped = bench_session.enter(provider, Contender(op, args), benchmark.extra_info)
        if siblings[-1] is request.node:
            bench_session.finish(case, work, shapes_of(args))
        if skipped:
            pytest.skip(skipped)
        call = _synchronised(op, bench_session.device)
        benchmark.pedantic(call, args=args, rounds=HOST_ROUNDS, warmup_rounds=1)

    return run


def _synchronised(op: Callable, device: torch.device) -> Callable:
    if device.type != "cuda":
        return op

    def call(*args) -> None:
        op(*args)
        torch.cuda.synchronize()

    return call
