"""Uploads: the numbers are those of the list; on a GPU they come from pinned memory, unawaited."""

import pytest
import torch

from aerie.llama4.upload import upload


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("values", "dtype"), [([3, -1, 2**40], torch.int64), ([0.5], torch.float32), ([], torch.int32)]
)
def test_is_the_list(values, dtype, device):
    there = upload(values, dtype, device)
    assert (there.dtype, there.device.type, there.shape) == (dtype, device, (len(values),))
    if device == "cpu":
        assert there.tolist() == values


def test_a_default_device_changes_nothing():
    """Where it is a GPU, there would be nothing to pin: only memory of the host can be."""
    with torch.device("meta"):
        assert upload([3, 5], torch.int64, "cpu").tolist() == [3, 5]


def test_a_gpu_is_not_waited_for(monkeypatch):
    asked = []

    class Host:
        def __init__(self, values, dtype, device, pin_memory) -> None:
            asked.append((device, "pinned", pin_memory))

        def to(self, device, non_blocking):
            asked.append((device, non_blocking))
            return self

    monkeypatch.setattr(torch, "tensor", Host)
    upload([1], torch.int64, "cuda:1")
    assert asked == [("cpu", "pinned", True), ("cuda:1", True)]


@pytest.mark.gpu
def test_on_a_gpu():
    assert upload([4, 5], torch.int64, "cuda").tolist() == [4, 5]
