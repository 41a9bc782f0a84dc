"""Continuous batching: requests join and leave while others run.

The host never waits for the pass it has just launched. What a pass wrote is copied to the host
behind it and read while the next one runs: a sequence that has ended is noticed one round late, and
what that round wrote for it is dropped. On a CPU there is nothing to wait for, and nothing late.

Running sequences are rows 0 .. of the batch, so a round over them needs no list of rows; behind
them stands the one whose prompt is being read. The last row moves where another has left.
"""

import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aerie.eagle3.sequences import Burst, Decoded, Request
from aerie.eagle3.stats import BatchRound

PREFILL_ROWS = 1024  # rows of prompts between two rounds; bounds their activations
DEAD_DRAFT = (
    "the draft looks dead: %.0f of 100 first drafted tokens were accepted in %d drafts. The text "
    "is right but not faster; `aerie probe` tests the known ways to misread a draft"
)

logger = logging.getLogger("aerie.eagle3")


@dataclass(frozen=True)
class Report:
    """What a pass did: per sequence the count of its new tokens, then these, the bonus last."""

    numbers_BP: Tensor
    num_drafted: int = 0
    depth: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    launched: str = ""  # where graphs are wanted: "graph", or why a round ran without one

    def book(self, decoded: Decoded, num_accepted: int) -> None:
        """Into the statistics of one of the sequences; warns once if the draft seems dead."""
        stats = decoded.stats
        stats.count_draft(self.num_drafted, num_accepted, self.depth)
        stats.draft_ms += self.draft_ms
        stats.verify_ms += self.verify_ms
        if self.launched:
            stats.launches[self.launched] += 1
        if stats.is_at_the_floor and not decoded.has_warned:
            decoded.has_warned = True
            first = 100 * stats.acceptance_per_position[0]
            logger.warning(DEAD_DRAFT, first, stats.num_drafts)


class Passes(Protocol):
    """What the engine launches (`generate.Speculation`); rows are those of the batch."""

    def prefill(self, row: int, request: Request, start: int, end: int) -> Report | None: ...
    def round(self, sequences: int) -> Report: ...


class Places(Protocol):
    """Where sequences stand (`rows.Rows`)."""

    capacity: int

    def has_room_for(self, request: Request) -> bool: ...
    def join(self, row: int, request: Request, num_cached: int) -> None: ...
    def move(self, source: int, target: int) -> None: ...
    def leave(self, row: int) -> None: ...


class Readout:
    """A report on its way to the host, without a wait on the way."""

    def __init__(self, sequences: list[Decoded], report: Report) -> None:
        self.sequences, self.report = sequences, report
        numbers_BP = report.numbers_BP
        self._event = None
        if numbers_BP.is_cuda:
            host_BP = torch.empty(numbers_BP.shape, dtype=numbers_BP.dtype, pin_memory=True)
            numbers_BP = host_BP.copy_(numbers_BP, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._numbers_BP = numbers_BP

    def runs(self) -> list[list[int]]:
        """Of every sequence, the accepted tokens and the bonus token."""
        if self._event is not None:
            self._event.synchronize()
        return [ids[:count] for count, *ids in self._numbers_BP.tolist()]


class Engine:
    """Decodes requests in the order they came, at most `places.capacity` at a time."""

    def __init__(self, passes: Passes, places: Places, lag: int) -> None:
        """`lag` reports stay unread while the next pass is launched: 1 on a GPU, 0 elsewhere."""
        self._passes, self._places, self._lag = passes, places, lag
        self._waiting: deque[Decoded] = deque()
        self._rows: list[Decoded] = []  # the running ones, then the one that is being read
        self._num_running = 0
        self._unread: deque[Readout] = deque()
        self.rounds: list[BatchRound] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._rows)

    def add(self, request: Request, num_cached: int = 0, num_known: int = 0) -> Decoded:
        """Queues a request, whose row will hold the first `num_cached` tokens already; what comes
        before token `num_known` of its prompt is the text of earlier turns."""
        decoded = Decoded(request, num_prefilled=num_cached, num_known=num_known)
        self._waiting.append(decoded)
        return decoded

    def step(self) -> list[tuple[Decoded, Burst]]:
        """Reads some prompts, runs one round, and returns what the host has come to know."""
        start, num_unread = time.perf_counter(), len(self._unread)
        self._read_prompts()
        prefilled, report, num_running = time.perf_counter(), None, self._num_running
        if num_running:
            report = self._passes.round(num_running)
            self._unread.append(Readout(self._rows[:num_running], report))
        present, is_idle = list(self._rows), len(self._unread) == num_unread
        bursts = self._read(keep=0 if is_idle else self._lag)
        elapsed = 1e3 * (time.perf_counter() - start)
        for decoded in present:
            decoded.stats.total_ms += elapsed
            decoded.stats.end_round()
        if report is not None:
            parts = 1e3 * (prefilled - start), report.draft_ms, report.verify_ms
            self.rounds.append(BatchRound(num_running, *parts, elapsed - sum(parts)))
        return bursts

    def cancel(self, decoded: Decoded) -> None:
        """Forgets a request, between two steps; its pages are free."""
        if decoded in self._waiting:
            self._waiting.remove(decoded)
        elif decoded in self._rows:
            self._leave(decoded)

    def _read_prompts(self) -> None:
        """Up to `PREFILL_ROWS` rows of the prompts that come next."""
        rows = PREFILL_ROWS
        while rows > 0 and (self._num_running < len(self._rows) or self._admit()):
            decoded, row = self._rows[-1], len(self._rows) - 1
            request, start = decoded.request, decoded.num_prefilled
            end = decoded.end_of_pass(PREFILL_ROWS)
            with decoded.stats.timed("prefill"):
                report = self._passes.prefill(row, request, start, end)
            rows -= end - start
            decoded.num_prefilled = end
            if decoded.on_prefill is not None:
                decoded.on_prefill(end)
            if report is None:
                decoded.stats.num_target_passes += 1
                continue
            self._num_running += 1
            self._unread.append(Readout([decoded], report))

    def _admit(self) -> bool:
        """Gives the next request a row and all its pages, if there are any."""
        if not self._waiting or len(self._rows) == self._places.capacity:
            return False
        if not self._places.has_room_for(self._waiting[0].request):
            return False
        decoded = self._waiting.popleft()
        self._places.join(len(self._rows), decoded.request, decoded.num_prefilled)
        self._rows.append(decoded)
        return True

    def _read(self, keep: int) -> list[tuple[Decoded, Burst]]:
        """All reports but the `keep` latest; those of a sequence that has ended are dropped."""
        bursts = []
        while len(self._unread) > keep:
            readout = self._unread.popleft()
            for decoded, run in zip(readout.sequences, readout.runs(), strict=True):
                if decoded in self._rows:
                    bursts.append((decoded, decoded.keep(run)))
                    readout.report.book(decoded, len(run) - 1)
                    if decoded.finish_reason is not None:
                        self._leave(decoded)
        return bursts

    def _leave(self, decoded: Decoded) -> None:
        """Frees the row: the last running one moves into it, and the one being read behind it."""
        row, last_running = self._rows.index(decoded), self._num_running - 1
        self._places.leave(row)
        if row <= last_running:
            self._num_running -= 1
        for source in (last_running, len(self._rows) - 1):
            if source > row:
                self._places.move(source, row)
                self._rows[row] = self._rows[source]
                row = source
        self._rows.pop()
