"""What an FP8 cache holds: codes (e4m3), and per layer the scales that make values of them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerie.kernels.stream_launch import FP8

KVCacheDtype = Literal["auto", "fp8"]


@dataclass(frozen=True)
class KVScales:
    """value = code * scale, for the keys and values of one layer; float32 [1] or [G], positive.

    Codes saturate at +-448, so a scale of 1 holds values up to 448.
    """

    k_scale: Tensor
    v_scale: Tensor

    @classmethod
    def ones(cls) -> "KVScales":
        """On the CPU, even while a model is built on the meta device."""
        return cls(torch.ones(1, device="cpu"), torch.ones(1, device="cpu"))

    def to(self, device: torch.device) -> "KVScales":
        return KVScales(self.k_scale.to(device), self.v_scale.to(device))


def cache_dtype(kv_cache_dtype: KVCacheDtype, model_dtype: torch.dtype) -> torch.dtype:
    """`auto` keeps keys and values as the model computes them. Raises ValueError."""
    if kv_cache_dtype not in ("auto", "fp8"):
        raise ValueError(f"kv_cache_dtype: must be 'auto' or 'fp8', got {kv_cache_dtype!r}")
    return FP8 if kv_cache_dtype == "fp8" else model_dtype
