"""Counters of the programs that have arrived at a tile whose depth is split.

They are zeroed once and every launch leaves them zero, so they are kept per stream: launches of one
stream follow each other. A launch that is captured gets its own, zeroed by the graph: graphs are
captured on one stream and replayed on any, in any order, and a zeroing that only another graph
holds may not have happened.
"""

from functools import cache

import torch
from torch import Tensor


def arrival_counters(like: Tensor, count: int) -> Tensor:
    """`count` zeros of int32 on the device of `like`, for one launch of the current stream."""
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return _zeros(like.device, count)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _kept(like.device, stream, count)


@cache
def _kept(device: torch.device, stream: int, count: int) -> Tensor:
    return _zeros(device, count)


def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
