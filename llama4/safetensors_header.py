"""The header of one safetensors file: which tensors it holds, and where.

The format (huggingface/safetensors): eight bytes with the header's length, a JSON header
`{name: {dtype, shape, data_offsets}}`, the data. Parsers agree on little more than that: of two
equal keys one wins silently. Here a file is one unambiguous set of complete tensors that cover its
data exactly, or a CheckpointError.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from aerie.llama4.json_fields import CheckpointError, unique_keys

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PICKLE_REASON = (
    "loading a pickle runs code that it contains, so it is refused; convert it to safetensors "
    "where you trust it"
)
# bits of an element and PyTorch's type; None: PyTorch (or this package) has none
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "F32": (32, torch.float32),
    "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: `nbytes` at `offset` from its start, row-major."""

    name: str
    file: Path
    kind: str  # the format's name of the type, as in DTYPES
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """PyTorch's type, None if it has none."""
        return DTYPES[self.kind][1]

    @property
    def shown_dtype(self) -> str:
        return str(self.dtype or self.kind)

    def extents(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Where rows `first` to `last` lie: offsets in the file and bytes, in the rows' order."""
        row = self.nbytes // max(1, self.shape[0] if self.shape else 1)
        yield self.offset + first * row, (last - first) * row


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file. Raises CheckpointError unless it is complete and unambiguous."""
    try:
        with open(file, "rb", opener=_open_regular) as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(_not_safetensors(file, start, size))
            header = json.loads(stream.read(length), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: a safetensors file that the index lists is missing; fetch it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError) and str(file) in str(error):
            raise
        raise CheckpointError(
            f"{file}: not a readable safetensors file (header: {error}); fetch it again"
        ) from error
    return _described(file, header, 8 + length, size)


def _open_regular(path: str, flags: int) -> int:
    """A pipe or device in place of a file must neither block nor be read without end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return descriptor


def _not_safetensors(file: Path, start: bytes, size: int) -> str:
    with file.open("rb") as stream:
        head = stream.read(24)
    reason = f"{size} bytes do not hold the header they announce; fetch the file again"
    if size == 0:
        reason = "empty; fetch the file again"
    elif head == b"version https://git-lfs.":
        reason = "it is a Git-LFS pointer, run git lfs pull"
    elif head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        reason = f"it is a pickle; {PICKLE_REASON}"
    return f"{file}: not a readable safetensors file ({reason})"


def _described(file: Path, header: object, data: int, size: int) -> list[StoredTensor]:
    """The header's entries, which must cover the file's data exactly, in any order of names."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: not a readable safetensors file (header: {what})")

    if not isinstance(header, dict):
        raise refuse(f"must be an object, got {type(header).__name__}")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise refuse("__metadata__ must map names to strings")
    found = [_entry(file, name, entry, data, refuse) for name, entry in header.items()]
    end = data
    for tensor in sorted(found, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise refuse(f"{tensor.name!r} leaves a hole or overlaps at byte {tensor.offset}")
        end += tensor.nbytes
    if end != size:
        raise refuse(f"its tensors end at byte {end}, the file at {size}; fetch it again")
    return found


def _entry(file: Path, name: str, entry: object, data: int, refuse) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"{name!r} must have dtype, shape and data_offsets, got {entry!r:.200}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise refuse(f"{name!r} has the unknown dtype {kind!r:.50}")
    for numbers in (shape, offsets):
        is_list = isinstance(numbers, list) and len(numbers) <= 64
        if not is_list or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise refuse(f"{name!r} needs lists of non-negative integers, got {entry!r:.200}")
    bits = math.prod(shape) * DTYPES[kind][0]
    if len(offsets) != 2 or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise refuse(f"{name!r}: {kind} {shape} does not fill the bytes {offsets}")
    return StoredTensor(name, file, kind, tuple(shape), data + offsets[0], bits // 8)
