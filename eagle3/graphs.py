"""Whole rounds as CUDA graphs: captured once per size class, replayed with other contents.

A round works in place on the columns of the batch and asks the host for nothing, so one launch can
replay all of it: draft, verify, sample, accept and commit. A class of more rows than sequences run
is filled up with idle rows, which stand at position 0 and own no pages. What a round's shape
depends on is fixed here: policies without a stop, and two ways to choose, greedy and sampled with
all filters (a filter that is off keeps everything). Other rounds run as they are.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from aerie.eagle3.drafter import CachedDrafter, Drafter, NoDrafter
from aerie.eagle3.engine import Report
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Request

if TYPE_CHECKING:
    from aerie.eagle3.generate import Speculation

ALL_FILTERS = SamplingParams(temperature=1.0, top_k=1, top_p=0.5, min_p=0.5)
GREEDY = SamplingParams()
WARM_UPS = 2  # compile, and fill what is built once

Round = Callable[[], Report]
Capture = Callable[[Round], Round]

logger = logging.getLogger("aerie.eagle3")


@dataclass(frozen=True)
class SizeClass:
    """Rows of a captured round, and how it chooses."""

    sequences: int
    is_greedy: bool


class GraphedRounds:
    """The passes of `speculation`, its rounds replayed where they were captured."""

    @torch.inference_mode()
    def __init__(
        self, speculation: "Speculation", max_bytes: int, capture: Capture | None = None
    ) -> None:
        """Captures before any sequence has joined, the largest class first, as long as the graphs'
        own memory stays within `max_bytes`. `capture` replaces CUDA's.

        Raises ValueError for a policy whose rounds differ in shape, or without a GPU.
        """
        check_has_one_shape(speculation.drafter)
        if capture is None and speculation.rows.device.type != "cuda":
            raise ValueError(f"cuda_graph_bytes: needs a GPU, got {speculation.rows.device}")
        self.speculation, self._rounds = speculation, dict[SizeClass, Round]()
        self._capture = capture or CudaCapture(max_bytes)
        for size in reversed(size_classes(speculation.rows.capacity)):
            for is_greedy in (True, False):
                self._add(SizeClass(size, is_greedy))

    def prefill(self, row: int, request: Request, start: int, end: int) -> Report | None:
        return self.speculation.prefill(row, request, start, end)

    def round(self, sequences: int) -> Report:
        sampler = self.speculation.rows.sampler
        if sampler.needs_ids(sequences):  # rules differ from request to request
            return self.speculation.round(sequences)
        is_greedy = sampler.is_greedy(sequences)
        fitting = [
            size
            for size in self._rounds
            if size.sequences >= sequences and size.is_greedy == is_greedy
        ]
        if not fitting:
            return self.speculation.round(sequences)
        report = self._rounds[min(fitting, key=lambda size: size.sequences)]()
        # the host's times are those of the capture
        numbers_BP = report.numbers_BP[:sequences]
        return replace(report, numbers_BP=numbers_BP, draft_ms=0.0, verify_ms=0.0)

    def _add(self, size: SizeClass) -> None:
        rows = self.speculation.rows
        rows.batch.width = rows.batch.max_path  # one shape, whatever the last pass was
        params = GREEDY if size.is_greedy else ALL_FILTERS
        with rows.sampler.all_rows_as(params):
            for _ in range(WARM_UPS):
                self.speculation.round(size.sequences)
            try:
                self._rounds[size] = self._capture(lambda: self.speculation.round(size.sequences))
            except GraphMemoryError as error:
                logger.warning("%s sequences run without a CUDA graph: %s", size.sequences, error)


class GraphMemoryError(Exception):
    """The graphs' memory budget is used up."""


class CudaCapture:
    """Captures into one memory pool, which all graphs share, of at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._used = max_bytes, 0
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, call: Round) -> Round:
        if self._used >= self._max_bytes:
            raise GraphMemoryError(f"{self._used} of {self._max_bytes} bytes are used")
        torch.cuda.synchronize()
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            report = call()
        self._used += max(0, torch.cuda.memory_reserved() - before)
        if self._used > self._max_bytes:
            raise GraphMemoryError(f"{self._used} bytes, {self._max_bytes} are allowed")

        def replay() -> Report:
            graph.replay()
            return report

        return replay


def size_classes(capacity: int) -> list[int]:
    """1, 2, 4, ... and the capacity."""
    powers = [1 << bit for bit in range(capacity.bit_length())]
    return sorted({size for size in powers if size <= capacity} | {capacity})


def check_has_one_shape(drafter: Drafter) -> None:
    """Raises ValueError for drafters whose rounds depend on what they draft."""
    is_fixed = isinstance(drafter, NoDrafter) or (
        isinstance(drafter, CachedDrafter) and drafter.goes_on is None and drafter.draws is None
    )
    if not is_fixed:
        raise ValueError(
            "cuda_graph_bytes: a round must have one shape; drop the confidence threshold, "
            "cost-aware width or rejection, or capture no graphs"
        )
