"""Which target a device is: by its capability, AMD apart, and a tensor that is on no GPU."""

import pytest
import torch

from aerie.kernels import target
from aerie.kernels.target import AMPERE, BLACKWELL, HOPPER, MI300, lacks_fp8, target_of


class OnGpu:
    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), AMPERE),
        ((8, 9), AMPERE),
        ((9, 0), HOPPER),
        ((10, 0), BLACKWELL),
        ((12, 0), AMPERE),  # consumer Blackwell multiplies as Ampere does
    ],
)
@pytest.mark.parametrize("hip", [None, "7.0"])
def test_target_of_a_device(capability, expected, hip, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    target._target.cache_clear()
    assert target_of(OnGpu()) is (MI300 if hip else expected)
    target._target.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((8, 0), None, (8, 0)), ((8, 6), None, (8, 6)), ((8, 9), None, None), ((9, 4), "7.0", None)],
)
def test_which_device_lacks_fp8(capability, hip, expected, monkeypatch):
    """AMD counts its capabilities otherwise; a CPU, which interprets, has every type."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    target._target.cache_clear()
    assert lacks_fp8(OnGpu()) == expected
    assert lacks_fp8(torch.zeros(1)) is None
    target._target.cache_clear()


def test_the_interpreter_runs_what_hopper_would():
    assert target_of(torch.zeros(1)) is HOPPER
