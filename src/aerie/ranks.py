"""The processes that torchrun started for one command: where its environment is read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=5)  # kernels may be compiled on one rank while the others wait
T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def rank_device(device: torch.device) -> torch.device:
    """On a machine with several GPUs, the one that belongs to this rank."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def started(size: int, device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """The group of all ranks: NCCL on GPUs, gloo on CPUs; None for a size of 1.

    Raises ValueError where torchrun started another number of processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if size != processes:
        raise ValueError(
            f"--tensor-parallel-size: must be the number of processes that torchrun started, "
            f"got {size} for {processes}; use torchrun --nproc-per-node {size} -m aerie ..."
        )
    if size == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def agreed(value: T, group: dist.ProcessGroup | None) -> T:
    """Rank 0's value, any object."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0, group)
    return box[0]
