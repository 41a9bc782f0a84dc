"""Reading a small matrix in order before a CPU multiplies few rows by it, where that pays.

For few rows MKL may read the weights in an order that memory answers slowly; a sum, which nobody
needs, reads them in order, and the product then finds them in the core's cache. On other machines
both are as fast as memory and the sum is lost time, so that it is measured, once.
Nothing is computed from the sum: results are the same either way.
"""

import time
from functools import lru_cache
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED_BYTES = 1 << 19  # half of the second-level cache of a server's core
NUM_MATRICES, OUT, IN, TRIALS = 256, 256, 128, 5  # 32 MB, more than is left of a shared cache


def read_ahead(weight: Tensor) -> None:
    """Sums a matrix that fits the cache of a CPU core, if that makes products with it faster.

    Nothing where a compiler traces: it would drop the sum, and cannot trace the clock.
    """
    if torch.compiler.is_compiling() or not pays():
        return
    if weight.is_cpu and weight.nbytes <= CACHED_BYTES:
        weight.sum()


@lru_cache(maxsize=1)
@torch.inference_mode()
def pays() -> bool:
    """Whether a row times many matrices, one after the other, is faster with the sums: tens of
    milliseconds, once a process. By medians: how much of a shared cache others leave varies, and
    the best case is not what decoding meets."""
    row, matrices = torch.ones(1, IN), torch.ones(NUM_MATRICES, IN, OUT).mT

    def seconds(*, ahead: bool) -> float:
        start = time.perf_counter()
        for matrix in matrices:
            if ahead:
                matrix.sum()
            F.linear(row, matrix)
        return time.perf_counter() - start

    trials = [(seconds(ahead=True), seconds(ahead=False)) for _ in range(TRIALS)]
    ahead_s, plain_s = map(median, zip(*trials, strict=True))
    return ahead_s < plain_s
