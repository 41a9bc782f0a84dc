"""Reading stored tensors into their places, a piece at a time and several files' pieces at once.

A piece is some rows of a tensor, or one expert: read into a buffer that its thread keeps (a fresh
one would cost more in page faults than the reading), cast on the way into the place, and checked
there. Where nothing is to be cast the bytes go straight into the place.
"""

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.packing import Place
from aerie.llama4.safetensors_header import StoredTensor
from aerie.llama4.value_checks import SeenValues, count_no_scales
from aerie.llama4.weight_quantization import BLOCK, quantize_weight

PIECE_BYTES = 4 * 2**20  # stays in the cache between reading, casting and checking
MAX_THREADS = 8
MAX_NAMED = 5

logger = logging.getLogger("aerie.llama4")


@dataclass(frozen=True)
class Copy:
    """One tensor on its way from a file to its place in `parameter` (on "meta": only checked).

    Unquantised values that become codes have a `scale`, the region that their scales go to.
    """

    name: str
    source: StoredTensor
    place: Place
    parameter: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Findings:
    """What is wrong with values; and matrices that are all zero or denormal, which is odd."""

    problems: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def read_all(
    copies: Sequence[Copy],
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Findings:
    """Runs all copies and returns what their values are like. Raises CheckpointError."""
    total, done, lock = sum(copy.source.nbytes for copy in copies), 0, threading.Lock()

    def run(copy: Copy) -> Findings:
        nonlocal done
        found = _copy(copy, check_finite)
        with lock:
            done += copy.source.nbytes
            if progress is not None:
                progress(done, total)
        return found

    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        try:
            found = list(pool.map(run, copies))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return Findings(
        tuple(line for each in found for line in each.problems),
        tuple(name for each in found for name in each.idle),
    )


def log_oddities(folder: Path, copies: Sequence[Copy], idle: Sequence[str]) -> None:
    """Says what a loaded checkpoint may but should not be, and what was cast."""
    if idle:
        names = ", ".join(idle[:MAX_NAMED]) + (", ..." if len(idle) > MAX_NAMED else "")
        logger.warning(
            "%s: all values are zero or denormal in %d matrices (%s): was the file written whole?",
            folder,
            len(idle),
            names,
        )
    values = [copy for copy in copies if copy.place.role == "value" and copy.place.parameter]
    cast = Counter(c.source.kind for c in values if c.source.dtype != c.parameter.dtype)
    if cast:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(cast.items()))
        logger.info("%s: tensors cast to %s: %s", folder, values[0].parameter.dtype, kinds)


def read(source: StoredTensor) -> Tensor:
    """A whole tensor as it is stored. Raises CheckpointError."""
    if source.dtype is None:
        raise CheckpointError(f"{source.file}: {source.name}: PyTorch has no type {source.kind}")
    result = torch.empty(source.shape, dtype=source.dtype)
    with source.file.open("rb") as stream:
        _fill(stream.fileno(), source, 0, len(result) if source.shape else 1, _bytes(result))
    return result


def read_rows(source: StoredTensor, first: int, last: int) -> Tensor:
    """Some rows as they are stored, in this thread's buffer: gone with its next use."""
    with source.file.open("rb") as stream:
        return _read_rows(stream.fileno(), source, first, last)


def _copy(copy: Copy, check_finite: bool) -> Findings:
    wrong, seen = 0, SeenValues()
    is_scale = copy.place.role == "scale"
    with copy.source.file.open("rb") as stream:
        for first, last in _pieces(copy):
            piece = _place_rows(stream.fileno(), copy, first, last)
            if is_scale:
                wrong += count_no_scales(piece)
            elif check_finite:
                seen.look(piece)
    rule = f"not finite in {copy.parameter.dtype}"
    if is_scale:
        rule = "a scale must be positive and finite"
    if wrong := wrong + seen.not_finite:
        problem = (
            f"{copy.name}: {rule}: {wrong} of {math.prod(copy.source.shape)} values "
            f"[{copy.source.file.name}]; the file is damaged or was written wrongly"
        )
        return Findings((problem,))
    is_idle = len(copy.source.shape) > 1 and seen.are_next_to_nothing
    return Findings(idle=(copy.name,) if is_idle else ())


def _place_rows(file: int, copy: Copy, first: int, last: int) -> Tensor:
    """Puts some rows into their place; returns them as they are to be checked."""
    source, target = copy.source, copy.parameter
    if copy.scale is not None:
        rows = _read_rows(file, source, first, last)
        if not target.is_meta:
            _quantize_rows(copy, rows, first, last)
        return rows
    if target.is_meta:
        return _read_rows(file, source, first, last).to(target.dtype)
    region = _region(copy)
    if region.numel() != math.prod(source.shape):
        return region.copy_(_read_rows(file, source, first, last).reshape(()))
    piece = region[first:last]
    if _read_in_place(file, source, first, piece):
        return piece
    rows = _read_rows(file, source, first, last)
    _put(rows, piece)
    return rows if rows.dtype == piece.dtype else piece  # rows are dense and still in the cache


def _put(rows: Tensor, piece: Tensor) -> None:
    """Experts that lie crosswise go one by one: PyTorch transposes a matrix in blocks."""
    is_crosswise = rows.ndim == 3 and not piece.is_contiguous() and piece.mT.is_contiguous()
    if is_crosswise and piece.device.type == "cpu":
        for target, source in zip(piece.mT, rows.mT, strict=True):
            target.copy_(source)
    else:
        piece.copy_(rows)


def _quantize_rows(copy: Copy, rows: Tensor, first: int, last: int) -> None:
    """Codes and scales of some rows; of a fused tensor, of some experts."""
    assert copy.scale is not None
    codes = copy.parameter[copy.place.index] if copy.place.index else copy.parameter
    if copy.place.transposed:
        rows = rows.mT
    unit = 1 if len(codes) == len(copy.scale) else BLOCK
    scales = copy.scale[first // unit : -(-last // unit)]
    quantize_weight(rows.to(codes.device), codes[first:last], scales)


def _region(copy: Copy) -> Tensor:
    """The place as a view with the shape of the stored tensor, if it has as many numbers."""
    shape = copy.source.shape or (1,)
    region = copy.parameter[copy.place.index] if copy.place.index else copy.parameter
    if copy.place.transposed:
        region = region.mT
    return (
        region.view(shape)
        if region.shape != shape and region.numel() == math.prod(shape)
        else region
    )


def _pieces(copy: Copy) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about PIECE_BYTES, whole blocks of them where blocks are made."""
    source = copy.source
    rows = source.shape[0] if source.shape else 1
    step = max(1, PIECE_BYTES * rows // max(1, source.nbytes))
    if copy.scale is not None and source.shape[0] != copy.scale.shape[0]:
        step = max(1, step // BLOCK) * BLOCK
    yield from ((first, min(first + step, rows)) for first in range(0, rows, step))


def _read_in_place(file: int, source: StoredTensor, first: int, piece: Tensor) -> bool:
    """Reads without a detour where memory has the layout of the file."""
    same = piece.dtype == source.dtype and piece.device.type == "cpu" and piece.is_contiguous()
    if same:
        _fill(file, source, first, first + len(piece), _bytes(piece))
    return same


def _read_rows(file: int, source: StoredTensor, first: int, last: int) -> Tensor:
    """Some rows as they are stored, in this thread's buffer: gone with its next use."""
    assert source.dtype is not None
    shape = (last - first, *source.shape[1:])
    size = math.prod(shape) * source.dtype.itemsize
    buffer = getattr(_mine, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _mine.buffer = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8)
    _fill(file, source, first, last, buffer[:size])
    return buffer[:size].view(source.dtype).view(shape)


_mine = threading.local()


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _fill(file: int, source: StoredTensor, first: int, last: int, memory: Tensor) -> None:
    """Fills `memory` with some rows' bytes; a file that has become shorter is an error."""
    target, done = memory.numpy().data, 0
    for offset, nbytes in source.extents(first, last):
        end = done + nbytes
        while done < end:
            count = os.preadv(file, [target[done:end]], offset + nbytes - (end - done))
            if count == 0:
                raise CheckpointError(f"{source.file}: became shorter while it was read")
            done += count
