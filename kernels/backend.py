"""Which implementation of an operation a model runs: its Triton kernel or its eager reference.

The choice is made once, when a module is built (`pick`), and kept as a function reference; no
`forward` branches on it. Nothing here reads the environment: Triton itself decides at import time
whether its functions are compiled or interpreted, and `INTERPRETED` only looks at the result.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, TypeVar

import torch
import triton

Backend = Literal["auto", "triton", "eager"]
ResolvedBackend = Literal["triton", "eager"]
Op = TypeVar("Op", bound=Callable)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of activations and unquantised weights

NO_GPU = (
    "backend='triton' needs a GPU, and {device} is none: pass backend='eager' to run the PyTorch "
    "references, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels."
)


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)


def resolve(backend: Backend, device: torch.device | str) -> ResolvedBackend:
    """`auto` is triton on a GPU and eager elsewhere. Raises ValueError where triton cannot run."""
    on_gpu = torch.device(device).type == "cuda"
    if backend not in ("auto", "triton", "eager"):
        raise ValueError(f"backend: must be 'auto', 'triton' or 'eager', got {backend!r}")
    if backend == "auto":
        return "triton" if on_gpu else "eager"
    if backend == "triton" and not (on_gpu or INTERPRETED):
        raise ValueError(NO_GPU.format(device=f"device {str(device)!r}"))
    return backend


def pick(backend: ResolvedBackend, op: Op, ref: Op) -> Op:
    """The function a module keeps: the public Triton op, or its eager reference."""
    return op if backend == "triton" else ref


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in the references' own precision: float32, or float64 when a test asks for the truth."""
    return x.float() if x.itemsize < 4 else x


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.to(dtype)`, without the call into PyTorch where nothing would happen."""
    return x if x.dtype == dtype else x.to(dtype)


def constant(value: float, like: torch.Tensor) -> torch.Tensor:
    """`value` as a scalar tensor of the dtype and on the device of `like`, built once."""
    return _constant(value, like.dtype, like.device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # usable in training too, wherever it was asked for first
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def check_dtype(name: str, x: torch.Tensor) -> None:
    """Raises ValueError unless float32, in which the kernels compute, holds every value of `x`."""
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: must be float32, float16 or bfloat16, got {x.dtype}")


def check_launchable(x: torch.Tensor) -> None:
    """Raises ValueError where a launch on `x` would fail inside the driver or compute garbage."""
    if INTERPRETED:
        if x.dtype == torch.bfloat16:
            raise ValueError(
                "dtype: Triton's interpreter computes bfloat16 wrongly; use float32 or float16"
            )
        return
    if not x.is_cuda:
        raise ValueError(NO_GPU.format(device=f"a tensor on device '{x.device}'"))
    if x.device.index != torch.cuda.current_device():
        raise ValueError(
            f"device: tensors are on {x.device}, the current device is "
            f"cuda:{torch.cuda.current_device()}; call torch.cuda.set_device({x.device.index})"
        )
