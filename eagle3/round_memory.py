"""What a round keeps while it runs, found by running one on tensors that have no values.

A captured round keeps as much for good: the graphs of all size classes share one pool, of which the
largest class takes the most. Scratch inside a kernel is not seen, nor what the pool loses to
fragments: `GRAPH_MARGIN` is for that, and no GPU has confirmed it. The pool grows by segments, so
that the graphs of the smallest model take `SEGMENTS`.
"""

import torch

from aerie.eagle3.choice_form import ChoiceForm
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import Speculation
from aerie.eagle3.policies import Chain, Policy
from aerie.eagle3.rows import Pair, Rows
from aerie.llama4.live_memory import LiveMemory
from aerie.llama4.model import Llama4ForCausalLM

CONTEXT = 64  # tokens of the texts in that round; what it keeps does not grow with them
GRAPH_MARGIN = 2
SEGMENTS = (2 + 20) * 2**20  # PyTorch's least: one for tensors up to 1 MiB, one for larger ones


def graph_bytes(kept: int) -> int:
    """What the graphs of rounds that keep so many bytes may take from CUDA."""
    return GRAPH_MARGIN * (kept + SEGMENTS)


@torch.inference_mode()
def round_bytes(
    target: Llama4ForCausalLM,
    draft: Eagle3Llama4ForCausalLM | None,
    policy: Policy | None,
    sequences: int,
    form: ChoiceForm,
) -> int:
    """The most that a round of so many sequences keeps between its operations.

    `target` and `draft`, bound to each other, are on the meta device.
    """
    pair = Pair(target, draft, policy or Chain())
    rows = Rows(pair, [CONTEXT] * sequences, sequences)
    speculation = Speculation(pair, rows)
    rows.batch.width = rows.batch.max_path
    stored = [x for cache in rows.caches for pool in cache.pools for x in pool.tensors]
    rows.sampler.rules.reserve(form.rules)
    held = [*rows.batch.columns, *rows.sampler.rules.columns]
    existing = [*_tensors(target), *_tensors(draft), *stored, *held]
    with rows.sampler.all_rows_as(form):
        speculation.round(sequences)  # builds what is built once
        with LiveMemory(existing) as live:
            speculation.round(sequences)
    return live.peak


def _tensors(module: torch.nn.Module | None) -> list[torch.Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]
