"""Room for weights that a loader fills, on huge pages where the system has them.

Filling fresh memory on a CPU costs more in page faults than in reading the file: 1.4 GB/s with
pages of 4 KiB, 4.3 GB/s with 2 MiB, from one thread and a warm file (the reading alone; for all of
it see `bench/loading.py`). Linux gives huge pages to private mappings that ask for them.
"""

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
MIN_BYTES = 2 * HUGE_PAGE  # a smaller mapping may not hold a whole aligned page


def empty_like(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Memory with the shape and strides of `tensor`, without values."""
    nbytes = tensor.numel() * dtype.itemsize  # parameters are dense
    is_plain = torch.device(device).type != "cpu" or nbytes < MIN_BYTES
    if is_plain or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).as_strided(tensor.shape, tensor.stride())
