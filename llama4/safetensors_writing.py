"""Writing safetensors files whose tensors come one after the other, none of them kept in memory.

A file begins with the sizes of all its tensors, so a plan of them comes first. The largest elements
come first in the file: every tensor is then aligned, whatever its neighbours' sizes.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from aerie.llama4.safetensors_header import DTYPES
from aerie.llama4.stored_tensors import INDEX, SINGLE

KINDS = {dtype: kind for kind, (_, dtype) in DTYPES.items() if dtype is not None}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written; `kind` is the format's name of its type."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        return DTYPES[self.kind][0]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.bits // 8


def planned(name: str, dtype: torch.dtype, shape: Iterable[int]) -> Planned:
    """The plan of a tensor that PyTorch will hold."""
    return Planned(name, KINDS[dtype], tuple(shape))


class ShardWriter:
    """One file; tensors may be written in any order, but all of them."""

    def __init__(self, file: BinaryIO, plan: Sequence[Planned]) -> None:
        self.file = file
        header, self.offsets = {"__metadata__": {"format": "pt"}}, {}
        end = 0
        for tensor in sorted(plan, key=lambda tensor: -tensor.bits):
            first, end = end, end + tensor.nbytes
            entry = {"dtype": tensor.kind, "shape": tensor.shape, "data_offsets": (first, end)}
            header[tensor.name] = entry
            self.offsets[tensor.name] = first
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        file.truncate(self.start + end)
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The values of a planned tensor."""
        self.write_bytes(name, 0, tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def write_bytes(self, name: str, offset: int, data: memoryview | bytes) -> None:
        """Some bytes of a planned tensor, from one of them on."""
        self.file.seek(self.start + self.offsets[name] + offset)
        self.file.write(data)

    def finish(self) -> None:
        """Everything is on the disk when this returns."""
        self.file.flush()
        os.fsync(self.file.fileno())


def shard_name(number: int, shards: int) -> str:
    """As transformers names them; one file alone has no number."""
    return SINGLE if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"


def write_index(folder: Path, shards: Sequence[Sequence[Planned]]) -> None:
    """Which file holds which tensor, if there are several files."""
    if len(shards) == 1:
        return
    total = sum(tensor.nbytes for plan in shards for tensor in plan)
    files = {
        tensor.name: shard_name(number, len(shards))
        for number, plan in enumerate(shards)
        for tensor in plan
    }
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2))
