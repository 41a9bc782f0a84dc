"""Reading stored tensors into their places, a piece at a time and several files' pieces at once.

A piece is some rows of a tensor, or one expert: read into a buffer that its thread keeps (a fresh
one would cost more in page faults than the reading), cast on the way into the place, and checked
there. Where nothing is to be cast the bytes go straight into the place.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.packing import Place
from aerie.llama4.stored_tensors import StoredTensor

PIECE_BYTES = 4 * 2**20  # stays in the cache between reading, casting and checking
MAX_THREADS = 8


@dataclass(frozen=True)
class Copy:
    """One tensor on its way from a file to its place in `parameter` (on "meta": only checked)."""

    name: str
    source: StoredTensor
    place: Place
    parameter: Tensor


def read_all(
    copies: Sequence[Copy],
    check_finite: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Runs all copies and returns what is wrong with their values. Raises CheckpointError."""
    total, done, lock = sum(copy.source.nbytes for copy in copies), 0, threading.Lock()

    def run(copy: Copy) -> list[str]:
        nonlocal done
        problems = _copy(copy, check_finite)
        with lock:
            done += copy.source.nbytes
            if progress is not None:
                progress(done, total)
        return problems

    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        try:
            return [line for lines in pool.map(run, copies) for line in lines]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def read(source: StoredTensor) -> Tensor:
    """A whole tensor as it is stored. Raises CheckpointError."""
    if source.dtype is None:
        raise CheckpointError(f"{source.file}: {source.name}: PyTorch has no type {source.kind}")
    result = torch.empty(source.shape, dtype=source.dtype)
    with source.file.open("rb") as stream:
        _fill(stream.fileno(), source, 0, _bytes(result))
    return result


def _copy(copy: Copy, check_finite: bool) -> list[str]:
    source, target = copy.source, copy.parameter
    assert source.dtype is not None
    view = _region(copy)
    wrong = 0
    with source.file.open("rb") as stream:
        for first, last in _pieces(source):
            if target.is_meta:
                piece = _read_rows(stream.fileno(), source, first, last).to(target.dtype)
            else:
                piece = view[first:last]
                if not _read_in_place(stream.fileno(), source, first, piece):
                    piece.copy_(_read_rows(stream.fileno(), source, first, last))
            if check_finite and piece.is_floating_point():
                wrong += _count_not_finite(piece)
    if not wrong:
        return []
    count = math.prod(source.shape)
    return [
        f"{copy.name}: not finite in {target.dtype}: {wrong} of {count} values "
        f"[{source.file.name}]; the file is damaged or needs a wider dtype"
    ]


def _region(copy: Copy) -> Tensor:
    """The place as a view with the shape of the stored tensor (one dimension at least)."""
    region = copy.parameter[copy.place.index] if copy.place.index else copy.parameter
    if copy.place.transposed:
        region = region.mT
    return region.view(copy.source.shape or (1,)) if region.shape != copy.source.shape else region


def _pieces(source: StoredTensor) -> Iterator[tuple[int, int]]:
    rows = source.shape[0] if source.shape else 1
    step = max(1, PIECE_BYTES * rows // max(1, source.nbytes))
    yield from ((first, min(first + step, rows)) for first in range(0, rows, step))


def _read_in_place(file: int, source: StoredTensor, first: int, piece: Tensor) -> bool:
    """Reads without a detour where memory has the layout of the file."""
    same = piece.dtype == source.dtype and piece.device.type == "cpu" and piece.is_contiguous()
    if same:
        _fill(file, source, first, _bytes(piece))
    return same


def _read_rows(file: int, source: StoredTensor, first: int, last: int) -> Tensor:
    """Some rows as they are stored, in this thread's buffer: gone with its next use."""
    assert source.dtype is not None
    shape = (last - first, *source.shape[1:])
    size = math.prod(shape) * source.dtype.itemsize
    buffer = getattr(_mine, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _mine.buffer = torch.empty(max(size, PIECE_BYTES), dtype=torch.uint8)
    _fill(file, source, first, buffer[:size])
    return buffer[:size].view(source.dtype).view(shape)


_mine = threading.local()


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _fill(file: int, source: StoredTensor, first_row: int, memory: Tensor) -> None:
    """Fills `memory` with the bytes from a row on; a file that has become shorter is an error."""
    rows = source.shape[0] if source.shape else 1
    offset = source.offset + first_row * (source.nbytes // max(1, rows))
    target, done = memory.numpy().data, 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{source.file}: became shorter while it was read")
        done += count


def _count_not_finite(piece: Tensor) -> int:
    """Extremes first: they see every NaN and infinity at the speed of memory."""
    if piece.numel() == 0 or torch.stack(torch.aminmax(piece)).isfinite().all():
        return 0
    return int(piece.numel() - piece.isfinite().sum())
