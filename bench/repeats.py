"""The same bits, run after run: what a kernel with a split sum must show on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.copies import copied, tensors

RUNS = 100


def run_that_differs(op: Callable, args: tuple, runs: int = RUNS) -> int | None:
    """Number of the first of `runs` runs that gives other bits than run 0; None if none does.

    An op that returns nothing writes into its arguments, and gets new copies of them every time.
    """

    def answer() -> list[Tensor]:
        own = copied(args) if writes else args
        returned = op(*own)
        return [as_bytes(x) for x in tensors(own if returned is None else returned)]

    writes = op(*copied(args)) is None
    first = answer()
    for run in range(1, runs):
        if not all(map(torch.equal, first, answer())):
            return run
    return None


def as_bytes(x: Tensor) -> Tensor:
    """A copy, so that NaNs compare by their bits and later runs overwrite nothing."""
    return x.detach().clone().flatten().contiguous().view(torch.uint8)
