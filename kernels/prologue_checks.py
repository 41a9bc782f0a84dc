"""What `attention_prologue` refuses; every ValueError names argument, rule and value."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aerie.kernels.attention_temperature import temperature_factors
from aerie.kernels.rope import Layout
from aerie.kernels.rotation import Rotation
from aerie.kernels.stream_launch import DTYPES, FP8
from aerie.kernels.tree_attention_checks import check_scales

FP8_MAX, MAX_HEAD_DIM = 448.0, 256


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position, as in `attention_temperature`."""

    positions_T: Tensor  # int64, absolute
    floor_scale: float
    attn_scale: float
    _factors: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # memo

    def factors_T11(self, dtype: torch.dtype) -> Tensor:
        """For the reference: what multiplies the queries, computed by the step's first layer."""
        if dtype not in self._factors:
            arguments = self.positions_T, self.floor_scale, self.attn_scale
            self._factors[dtype] = temperature_factors(*arguments, dtype)
        return self._factors[dtype]


def check_prologue(
    qkv_TF: Tensor,
    caches: tuple[Tensor, Tensor],
    slots_T: Tensor,
    rotation: Rotation | None,
    layout: Layout,
    qk_norm_eps: float | None,
    temperature: Temperature | None,
    scales: tuple[Tensor | None, Tensor | None],
) -> None:
    """Raises ValueError on arguments that the kernel would read or write wrongly."""
    _check_caches(qkv_TF, *caches)
    check_scales(caches[0], *scales)
    kv_heads, head_dim = caches[0].shape[2:]
    if (
        qkv_TF.ndim != 2
        or qkv_TF.stride(-1) != 1
        or qkv_TF.shape[1] % head_dim
        or qkv_TF.shape[1] <= 2 * kv_heads * head_dim
    ):
        raise ValueError(
            f"qkv_TF: must be [T, (H + {2 * kv_heads}) * {head_dim}] with a contiguous last "
            f"dimension, got {tuple(qkv_TF.shape)} strides {qkv_TF.stride()}"
        )
    _check_vector("slots_T", slots_T, qkv_TF)
    if layout not in ("interleaved", "half"):
        raise ValueError(f"layout: must be 'interleaved' or 'half', got {layout!r}")
    if qk_norm_eps is not None and rotation is None:
        raise ValueError("qk_norm_eps: the norm follows a rotation, got none")
    if rotation is not None:
        for name, x in (("cos_TJ", rotation.cos_TJ), ("sin_TJ", rotation.sin_TJ)):
            expected = (qkv_TF.shape[0], head_dim // 2)
            if x.shape != expected or x.dtype != torch.float32 or not x.is_contiguous():
                raise ValueError(
                    f"rotation.{name}: must be a contiguous float32 {expected}, "
                    f"got {x.dtype} {tuple(x.shape)}"
                )
    if temperature is not None:
        _check_vector("temperature.positions_T", temperature.positions_T, qkv_TF)
        if not temperature.floor_scale > 0:
            raise ValueError(
                f"temperature.floor_scale: must be positive, got {temperature.floor_scale}"
            )


def _check_caches(qkv_TF: Tensor, k_cache_RCGK: Tensor, v_cache_RCGK: Tensor) -> None:
    if qkv_TF.dtype not in DTYPES:
        raise ValueError(f"qkv_TF: must be one of {DTYPES}, got {qkv_TF.dtype}")
    for name, cache in (("k_cache_RCGK", k_cache_RCGK), ("v_cache_RCGK", v_cache_RCGK)):
        if cache.ndim != 4 or not cache.is_contiguous():
            raise ValueError(
                f"{name}: must be a contiguous [R, C, G, K], "
                f"got shape {tuple(cache.shape)} strides {cache.stride()}"
            )
        if cache.dtype not in (qkv_TF.dtype, FP8) or cache.device != qkv_TF.device:
            raise ValueError(
                f"{name}: must be {qkv_TF.dtype} or {FP8} on {qkv_TF.device}, "
                f"got {cache.dtype} on {cache.device}"
            )
    head_dim = k_cache_RCGK.shape[3]
    if v_cache_RCGK.shape != k_cache_RCGK.shape or v_cache_RCGK.dtype != k_cache_RCGK.dtype:
        raise ValueError(
            f"v_cache_RCGK: must be {k_cache_RCGK.dtype} {tuple(k_cache_RCGK.shape)} as "
            f"k_cache_RCGK, got {v_cache_RCGK.dtype} {tuple(v_cache_RCGK.shape)}"
        )
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"k_cache_RCGK: K must be even, 2 to {MAX_HEAD_DIM}, got {head_dim}")


def _check_vector(name: str, x: Tensor, qkv_TF: Tensor) -> None:
    is_vector = x.shape == qkv_TF.shape[:1] and x.is_contiguous()
    if not is_vector or x.dtype != torch.int64 or x.device != qkv_TF.device:
        raise ValueError(
            f"{name}: must be a contiguous int64 [{qkv_TF.shape[0]}] on {qkv_TF.device}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
