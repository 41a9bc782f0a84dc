"""How many distinct experts a pass reads: counted on request, and free where nobody asks.

While a count is open, the routing of every mixture-of-experts layer is looked at on its way to the
experts; closed, the layers are as they were. Counting waits for nothing: the numbers stay on the
device until `read`. It sees what Python runs: a replayed CUDA graph is not counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.kernels.router import Routing
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.moe import MoE


@dataclass
class ExpertCounts:
    """Counts of the passes so far, one number per pass and layer with experts."""

    num_layers: int
    num_experts: int
    _rows: list[int]
    _touched: list[Tensor]

    def read(self) -> dict[int, float]:
        """Mean number of distinct experts a layer touched, by the rows of the pass."""
        if not self._touched:
            return {}
        counts = torch.stack(self._touched).tolist()
        by_rows: dict[int, list[int]] = {}
        for rows, count in zip(self._rows, counts, strict=True):
            by_rows.setdefault(rows, []).append(count)
        return {rows: sum(found) / len(found) for rows, found in sorted(by_rows.items())}

    def add(self, routing: Routing) -> None:
        is_touched_E = torch.zeros(
            self.num_experts, dtype=torch.int32, device=routing.ids_TA.device
        ).index_fill(0, routing.ids_TA.flatten().long(), 1)
        self._rows.append(len(routing.ids_TA))
        self._touched.append(is_touched_E.sum())


@contextmanager
def counted_experts(target: Llama4ForCausalLM) -> Iterator[ExpertCounts]:
    """Counts the passes of `target` while open. Raises ValueError for a target without experts."""
    layers = [module for module in target.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError("count_experts: this target has no layer with experts")
    counts = ExpertCounts(len(layers), target.config.num_local_experts, [], [])
    for layer in layers:
        layer.on_routing = counts.add
    try:
        yield counts
    finally:
        for layer in layers:
            layer.on_routing = None
