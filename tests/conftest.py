"""Shared fixtures. Without a GPU every kernel runs in Triton's interpreter, so all tests do.

Outputs that the package allocates are filled with NaN (integers with their largest value) while
tests run, so that an element no kernel wrote cannot pass by luck. Tests and cases marked `gpu` have
the sizes of real models: they run where there is a GPU (`pytest -m gpu`) and are skipped elsewhere.
"""

import os
from importlib.util import find_spec

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported

import pytest

from tests import without_hypothesis
from tests.ranks import Ranks

if find_spec("hypothesis") is None:
    without_hypothesis.install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" not in str(config.getoption("-m")):
        for item in items:
            if item.get_closest_marker("slow") is not None:
                item.add_marker(pytest.mark.skip(reason="takes a minute: pytest -m slow"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: real sizes"))


@pytest.fixture(autouse=True)
def _poisoned_allocations_and_seed():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtypes(device) -> tuple[torch.dtype, ...]:
    """The interpreter computes bfloat16 wrongly (kernels.md 9), so the CPU tests fp32 and fp16."""
    if device.type == "cuda":
        return (torch.float32, torch.float16, torch.bfloat16)
    return (torch.float32, torch.float16)


@pytest.fixture(scope="session", params=[2, 4], ids=["two-ranks", "four-ranks"])
def ranks(request, tmp_path_factory):
    """`ranks(function, *arguments)` runs a function on every rank of a gloo group (`Ranks`)."""
    group = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """As `ranks`, always two."""
    group = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()


@pytest.fixture(scope="session")
def assert_close():
    """`assert_close(actual, expected, t)`: |actual - expected| <= t * max|expected|.

    A failure prints the worst coordinate with both values, and the maximal and RMS error.
    """

    def check(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{actual.dtype} != {expected.dtype}"
        if actual.numel() == 0:
            return
        difference = (actual.double() - expected.double()).abs()
        difference = torch.where(difference.isnan(), torch.inf, difference)
        scale = max(expected.double().abs().max().item(), 1e-30)
        worst = int(difference.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape))
        assert difference.max().item() <= tolerance * scale, (
            f"max error {difference.max():.3e}, RMS {difference.square().mean().sqrt():.3e}, "
            f"allowed {tolerance * scale:.3e}; worst at {where}: "
            f"{actual[where].item()!r} instead of {expected[where].item()!r}"
        )

    return check
