"""The GPU that a launch rule chooses for: as much of it as its choices depend on.

Rules are pure functions: an op passes the target of its tensors' device, a test passes any.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """`unit` multiplies matrices: it decides which tiles fit the registers.

    "mma": operands and sums in registers, 16 rows at a time (Ampere, Ada, consumer Blackwell);
    "wgmma": 64 rows, operands in shared memory (Hopper); "tcgen05": 64 or 128, sums in a memory of
    their own, from which whole tiles are read back (Blackwell); "mfma": AMD's.
    """

    unit: Literal["mma", "wgmma", "tcgen05", "mfma"]

    @property
    def most_stages(self) -> int:
        return 2 if self.unit == "mfma" else 6  # AMD's local memory holds 64 KB


AMPERE, HOPPER, BLACKWELL, MI300 = map(Target, ("mma", "wgmma", "tcgen05", "mfma"))
BY_MAJOR = {9: HOPPER, 10: BLACKWELL, 11: BLACKWELL}  # CUDA's capability; the others have "mma"
FIRST_WITH_FP8 = (8, 9)  # Ada


def target_of(x: Tensor) -> Target:
    """The target of the device of `x`. The interpreter, which has no registers, is a Hopper GPU."""
    return _target(x.device) if x.is_cuda else HOPPER


def lacks_fp8(x: Tensor) -> tuple[int, int] | None:
    """CUDA's capability of the device of `x`, where it is too old to multiply FP8; else None."""
    if not x.is_cuda or target_of(x) is MI300:
        return None
    capability = torch.cuda.get_device_capability(x.device)
    return capability if capability < FIRST_WITH_FP8 else None


@cache
def _target(device: torch.device) -> Target:
    if torch.version.hip:
        return MI300
    return BY_MAJOR.get(torch.cuda.get_device_capability(device)[0], AMPERE)
