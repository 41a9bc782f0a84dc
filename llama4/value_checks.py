"""What the values of a tensor are, told piece by piece while it is read."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.kernels.stream_launch import FP8

FP8_NAN = 0x7F  # the only one, with either sign; what lies below orders as the magnitudes do


@dataclass
class SeenValues:
    """How many were not finite, and the largest magnitude of the others.

    Extremes come first: they see every NaN and infinity at the speed of memory.
    """

    not_finite: int = 0
    largest: float = 0.0
    smallest_normal: float = 0.0

    def look(self, piece: Tensor) -> None:
        """Takes a piece into account; whole numbers have nothing to tell."""
        if not piece.is_floating_point() or piece.numel() == 0:
            return
        self.smallest_normal = torch.finfo(piece.dtype).tiny
        if piece.dtype == FP8:
            codes = piece.view(torch.uint8) & FP8_NAN
            largest = codes.max().view(FP8).item()
        else:
            largest = torch.stack(torch.aminmax(piece)).abs().amax().item()
        if math.isfinite(largest):
            self.largest = max(self.largest, largest)
        else:
            self.not_finite += int((~piece.float().isfinite()).sum())

    @property
    def are_next_to_nothing(self) -> bool:
        """Zero or denormal, all that were seen."""
        return self.smallest_normal > 0 and self.largest < self.smallest_normal


def count_no_scales(piece: Tensor) -> int:
    """How many are not what a scale must be: positive and finite."""
    return int((~(piece.isfinite() & (piece > 0))).sum())
