"""Numbers of the host on their way to the device, without a wait for what runs there.

A copy from memory that is not pinned waits until the stream has come to it: a request that joins
running ones would stop them. PyTorch keeps a pinned buffer until its copy is done.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """`values` as a tensor of `dtype` on `device`, whatever PyTorch's default device is."""
    is_gpu = torch.device(device).type == "cuda"
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=is_gpu)
    return host.to(device, non_blocking=is_gpu)
