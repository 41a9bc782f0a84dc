"""What a safetensors folder holds, known from its headers before any tensor is read.

The format (huggingface/safetensors): eight bytes with the header's length, a JSON header
`{name: {dtype, shape, data_offsets}}`, the data. Parsers agree on little more than that: of two
equal keys one wins silently, an index may name files outside the folder, a link may point there.
Here a folder is one unambiguous set of complete tensors or a CheckpointError that lists every file
that is not. Values are read with `pread` and never mapped: a file that shrinks is an error instead
of a crash, and what has been read does not stay resident behind the model's back.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from aerie.llama4.json_fields import CheckpointError, read_json, unique_keys

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_LISTED = 1000  # problems in one message
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of the folder's weights. Raises CheckpointError listing every unusable file."""
    index = _index(folder)
    files = sorted(set(index.values())) if index else [SINGLE]
    found: list[StoredTensor] = []
    problems: list[str] = []
    for file in files:
        try:
            check_inside(folder, folder / file)
            found += read_header(folder / file)
        except CheckpointError as error:
            problems.append(str(error))
    if not problems:
        problems = [*_duplicates(folder, found), *_disagreements(folder, index, found)]
    if problems:
        raise CheckpointError("\n  ".join(problems[:MAX_LISTED]))
    return found


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


def _index(folder: Path) -> Mapping[str, str]:
    """Shard of every tensor name; empty for a checkpoint in a single file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        hint = f", only {', '.join(pickles[:3])}: {PICKLE_REASON}" if pickles else ""
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}{hint}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: 'weight_map' must be a non-empty object")
    names = sorted({str(name) for name in weight_map.values()})
    wrong = [f"{folder / INDEX}: {_shard_fault(name)}" for name in names if _shard_fault(name)]
    if wrong:
        raise CheckpointError("\n  ".join(wrong))
    return {tensor: str(name) for tensor, name in weight_map.items()}


def _shard_fault(name: str) -> str:
    """What is wrong with the name of a shard, "" if nothing: it must mean one file everywhere."""
    if name.endswith(PICKLES):
        return f"{name!r} is not a plain safetensors file name: {PICKLE_REASON}"
    plain = Path(name).name == name and not set(name) & set('\\/:*?"<>|')
    if not plain or not name.isprintable() or not name.endswith(".safetensors"):
        return f"{name!r} is not a plain safetensors file name"
    return ""


def check_inside(folder: Path, file: Path) -> None:
    """A file may be a link only within its folder, or into the blobs of the hub's own cache."""
    home, target = folder.resolve(), file.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{file}: a link to {target}, outside its folder; put the file itself there"
        )


def _duplicates(folder: Path, found: list[StoredTensor]) -> list[str]:
    files: dict[str, list[str]] = {}
    for tensor in found:
        files.setdefault(tensor.name, []).append(tensor.file.name)
    return [
        f"{folder}: {name}: in {' and in '.join(shards)}"
        for name, shards in files.items()
        if len(shards) > 1
    ]


def _disagreements(folder: Path, index: Mapping[str, str], found: list[StoredTensor]) -> list[str]:
    """An index and the headers of its shards must name the same tensors."""
    if not index:
        return []
    held = {tensor.name: tensor.file.name for tensor in found}
    differing = sorted(
        name for name in index.keys() | held.keys() if index.get(name) != held.get(name)
    )
    return [
        f"{folder / INDEX}: the index and the shard disagree about {name!r}: listed in "
        f"{index.get(name)}, held by {held.get(name)}"
        for name in differing
    ]
