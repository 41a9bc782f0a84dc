"""The choice of backend: what `auto` means, and one clear sentence where Triton cannot run."""

import pytest
import torch

from aerie.kernels import backend
from aerie.kernels.backend import check_launchable, constant, pick, resolve


def test_auto_is_triton_on_a_gpu_and_eager_elsewhere():
    assert resolve("auto", "cuda") == "triton"
    assert resolve("auto", "cpu") == "eager"
    assert resolve("eager", "cuda") == "eager"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert resolve("triton", "cpu") == "triton"
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU, and device 'cpu' is none: pass backend="):
        resolve("triton", "cpu")
    with pytest.raises(ValueError, match="a tensor on device 'cpu' is none"):
        check_launchable(torch.zeros(1))


def test_the_interpreter_refuses_bfloat16(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", True)
    check_launchable(torch.zeros(1))
    with pytest.raises(ValueError, match="computes bfloat16 wrongly"):
        check_launchable(torch.zeros(1, dtype=torch.bfloat16))


def test_rejects_an_unknown_name():
    with pytest.raises(ValueError, match="must be 'auto', 'triton' or 'eager', got 'cuda'"):
        resolve("cuda", "cpu")


def test_pick():
    assert pick("triton", min, max) is min
    assert pick("eager", min, max) is max


def test_constant_built_in_inference_serves_training():
    with torch.inference_mode():
        constant(0.12345, torch.ones(1))
    x = torch.ones(2, requires_grad=True)
    (x * constant(0.12345, x)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0.12345] * 2)
