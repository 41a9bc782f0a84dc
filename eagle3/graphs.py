"""Whole rounds as CUDA graphs: captured once per size class, replayed with other contents.

A round works in place on the columns of the batch and asks the host for nothing, so one launch can
replay all of it: draft, verify, sample or reject, accept and commit, with penalties, bad words and
the other rules on the device. A class of more rows than sequences run is filled up with idle rows,
which own no pages, or with the row whose prompt is being read. What a round's shape depends on is
fixed at capture: the policy, and the `ChoiceForm` that the requests need together.

What the host has to decide or compute in the middle of a round (confidence stops, cost-aware width,
logits processors) runs as it is, and so does what found no room: `Report.launched` says which of
them a round was, and the log says so once.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from aerie.eagle3.choice_form import GREEDY, ChoiceForm, common_form
from aerie.eagle3.drafter import CachedDrafter, Drafter, NoDrafter
from aerie.eagle3.engine import Report
from aerie.eagle3.sequences import Request

if TYPE_CHECKING:
    from aerie.eagle3.generate import Speculation

GRAPH = "graph"  # how a round was launched; otherwise the reason why it was not replayed
HOST_DECIDES = "the host decides in the middle of a round how much is drafted"
PROCESSORS = "logits processors are Python, called on the host"
NEW_RULES = "a request came whose rules no round was captured with"
NO_MEMORY = "captured rounds of so many sequences did not fit into cuda_graph_bytes"
WARM_UPS = 2  # compile, and fill what is built once

Round = Callable[[], Report]
Capture = Callable[[Round], Round]

logger = logging.getLogger("aerie.eagle3")


@dataclass(frozen=True)
class SizeClass:
    """Rows of a captured round, and how it chooses."""

    sequences: int
    form: ChoiceForm


class GraphedRounds:
    """The passes of `speculation`, its rounds replayed where they were captured."""

    @torch.inference_mode()
    def __init__(
        self,
        speculation: "Speculation",
        requests: Iterable[Request],
        max_bytes: int,
        capture: Capture | None = None,
    ) -> None:
        """Captures before any sequence has joined what rounds of `requests` need, the largest class
        first, as long as the graphs' own memory stays within `max_bytes`. `capture` replaces
        CUDA's. Raises ValueError without a GPU.
        """
        if capture is None and speculation.rows.device.type != "cuda":
            raise ValueError(f"cuda_graph_bytes: needs a GPU, got {speculation.rows.device}")
        self.speculation, self._rounds = speculation, dict[SizeClass, Round]()
        self._told: set[str] = set()
        self._is_fixed = has_one_shape(speculation.drafter)
        forms = forms_of(requests)
        rules = speculation.rows.sampler.rules
        rules.reserve(forms[0].rules)
        self._captured_rules = rules.form
        if not self._is_fixed:
            return
        self._capture = capture or CudaCapture(max_bytes)
        for sequences in reversed(size_classes(speculation.rows.capacity)):
            for form in forms:
                self._add(SizeClass(sequences, form))

    def prefill(self, row: int, request: Request, start: int, end: int) -> Report | None:
        return self.speculation.prefill(row, request, start, end)

    def round(self, sequences: int) -> Report:
        why_not = self._why_not(sequences)
        fitting = [] if why_not else self._fitting(sequences)
        if not fitting:
            why_not = why_not or NO_MEMORY
            self._tell(why_not)
            return replace(self.speculation.round(sequences), launched=why_not)
        report = self._rounds[fitting[0]]()
        # the host's times are those of the capture
        numbers_BP = report.numbers_BP[:sequences]
        return replace(report, numbers_BP=numbers_BP, draft_ms=0.0, verify_ms=0.0, launched=GRAPH)

    def _why_not(self, sequences: int) -> str:
        """Why the next round is not even looked for among the captured ones."""
        sampler = self.speculation.rows.sampler
        if not self._is_fixed:
            return HOST_DECIDES
        if sampler.has_processors(sequences):
            return PROCESSORS
        # its tables may be others by now than those that the graphs read
        return NEW_RULES if sampler.rules.form != self._captured_rules else ""

    def _fitting(self, sequences: int) -> list[SizeClass]:
        """Captured rounds that do for the next one, the smallest first, greedy before drawing."""
        form = self.speculation.rows.sampler.form(sequences)
        found = [s for s in self._rounds if s.sequences >= sequences and s.form.covers(form)]
        return sorted(found, key=lambda size: (size.sequences, size.form != GREEDY))

    def _tell(self, why_not: str) -> None:
        if why_not not in self._told:
            self._told.add(why_not)
            logger.warning("rounds that run without a CUDA graph: %s", why_not)

    def _add(self, size: SizeClass) -> None:
        rows = self.speculation.rows
        rows.batch.width = rows.batch.max_path  # one shape, whatever the last pass was
        with rows.sampler.all_rows_as(size.form):
            for _ in range(WARM_UPS):
                self.speculation.round(size.sequences)
            try:
                self._rounds[size] = self._capture(lambda: self.speculation.round(size.sequences))
            except GraphMemoryError as error:
                logger.warning("%s sequences run without a CUDA graph: %s", size.sequences, error)


def forms_of(requests: Iterable[Request]) -> list[ChoiceForm]:
    """What covers all rounds of the requests; and plain greedy, where some ask for no more."""
    own = {ChoiceForm.of(one.sampling, one.ends.eos_token_ids) for one in requests}
    common = common_form(own)
    return [common, GREEDY] if GREEDY in own and common != GREEDY else [common]


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
        torch.cuda.empty_cache()  # a capture begins with it; what warm-ups left would be set off
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


def has_one_shape(drafter: Drafter) -> bool:
    """Whether rounds are alike whatever is drafted, so that nobody has to look at it."""
    is_cached = isinstance(drafter, CachedDrafter) and drafter.goes_on is None
    return is_cached or isinstance(drafter, NoDrafter)
