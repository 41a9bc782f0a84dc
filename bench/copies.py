"""Copies of a call's inputs, as many as it takes to push each other out of the cache.

With R copies of b touched bytes each and R * b >= 4 caches, a walk through the copies reads every
one from memory. Small inputs never get there with a sane R; their rows say `cold: false`, which is
also how a step meets them: the kernel before has just written them.
"""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CACHES, MOST_COPIES, MOST_BYTES = 4, 32, {"cpu": 2**28, "cuda": 2**34}
L3 = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def copies_for(touched: int, held: int, cache_bytes: int, device: torch.device) -> int:
    """How many copies: enough to be cold, unless their number or size says stop.

    `touched` bytes are what a call moves, `held` what its inputs occupy (a table is held whole).
    """
    wanted = -(-CACHES * cache_bytes // max(touched, 1))
    fitting = max(1, MOST_BYTES[device.type] // max(held, 1))
    return max(1, min(wanted, MOST_COPIES, fitting))


def is_cold(touched: int, copies: int, cache_bytes: int) -> bool:
    return touched * copies >= CACHES * cache_bytes


def copied(value: Any) -> Any:
    """`value` with every tensor in it (also in sequences and dataclasses) copied, strides kept."""
    if isinstance(value, Tensor):
        return value.new_empty_strided(value.shape, value.stride()).copy_(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: copied(getattr(value, f.name)) for f in _given(value)})
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*map(copied, value))
    return type(value)(map(copied, value)) if isinstance(value, (list, tuple)) else value


def tensors(value: Any) -> list[Tensor]:
    """All tensors in `value`, in order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        return [x for field in _given(value) for x in tensors(getattr(value, field.name))]
    return [x for item in value for x in tensors(item)] if isinstance(value, (list, tuple)) else []


def _given(value: Any) -> list:
    return [field for field in fields(value) if field.init]


def held_bytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors(value))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, L3 of a CPU (32 MB where unknown)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    size = L3.read_text().strip() if L3.exists() else "32768K"
    return int(size.removesuffix("K")) * 1024
