"""What this machine is and what the package will do on it."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from aerie import __version__
from aerie.kernels.backend import INTERPRETED, resolve

PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "huggingface_hub")


def diagnose() -> dict[str, Any]:
    """Versions, devices, the meaning of `--backend auto` here and why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"aerie": __version__, "python": platform.python_version()}
    result |= {package: _version(package) for package in PACKAGES}
    result["torch"] = torch.__version__  # its metadata may not tell the build, +cpu or +cu130
    result["devices"] = ", ".join(_devices())
    result["backend auto"] = f"{resolve('auto', device)} ({_reason(device)})"
    result["backend triton"] = _triton_state(device)
    return result


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)", *gpus]


def _reason(device: str) -> str:
    if device == "cuda":
        return "a GPU is present"
    return "no GPU is visible to torch, so the PyTorch references run on the CPU"


def _triton_state(device: str) -> str:
    if INTERPRETED:
        return "interpreted (TRITON_INTERPRET is set): slow, float32 and float16 only"
    if device == "cuda":
        return "compiled for the GPU"
    return "not available: no GPU; set TRITON_INTERPRET=1 to interpret the kernels on the CPU"
