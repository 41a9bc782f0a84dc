"""Work of a call, and its time on a device. Nothing here runs on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Work:
    """What one call must do at least: bytes from and to memory, floating-point operations."""

    bytes: int
    flops: int = 0


def device_microseconds(call: Callable[[], object]) -> float:
    """Median over calls with a flushed L2; includes the launch, so read it as an upper bound."""
    milliseconds = triton.testing.do_bench(call, return_mode="median")
    assert isinstance(milliseconds, float)
    return 1e3 * milliseconds
