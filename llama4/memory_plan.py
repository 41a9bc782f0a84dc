"""What a target takes in memory, told from its config before anything is allocated.

Weights are those of the model built without values, in the types that the loader would give them;
keys and values follow the rule that allots them (`kv_plan`). Both are exact. Activations are those
of one pass, without the scratch inside its kernels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerie.llama4.attention_config import AttentionSpec
from aerie.llama4.cache import MAX_STEP_ROWS
from aerie.llama4.checkpoint import assign, planned_tensors
from aerie.llama4.kv_plan import PAGE_SIZE, plan_pools
from aerie.llama4.live_memory import LiveMemory
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.tensor_groups import NAMES, group_of


@dataclass(frozen=True)
class KVBytes:
    """Keys and values of all sequences, and the tables that say where they lie."""

    full: int  # layers of full attention
    chunked: int  # layers that need no more than a chunk and the rows of one step
    tables: int

    @property
    def total(self) -> int:
        return self.full + self.chunked + self.tables


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a (meta) module's weights by group, once they are loaded as `dtype`."""
    planned = planned_tensors(module, dtype)
    computed = {name: b for name, b in module.named_buffers() if name not in planned}
    sizes = dict.fromkeys(NAMES, 0)
    for name, tensor in (planned | computed).items():
        sizes[group_of(name)] += tensor.nbytes
    return {name: size for name, size in sizes.items() if size}


def kv_bytes(
    layers: Iterable[AttentionSpec], num_slots: int, batch: int, dtype: torch.dtype
) -> KVBytes:
    """What caches of `num_slots` positions for `batch` sequences take, in pages of `PAGE_SIZE`."""
    specs = list(layers)
    plans = plan_pools([s.chunk_size for s in specs], num_slots, PAGE_SIZE, MAX_STEP_ROWS)
    full = chunked = tables = 0
    for plan in plans:
        spec = specs[plan.layers[0]]
        size = plan.bytes(PAGE_SIZE, spec.num_kv_heads, spec.head_dim, dtype.itemsize)
        share = sum(specs[layer].chunk_size is not None for layer in plan.layers)
        chunked += batch * size * share // len(plan.layers)
        full += batch * size * (len(plan.layers) - share) // len(plan.layers)
        # pages, and the slots of every page spelled out
        entry = torch.int32.itemsize + PAGE_SIZE * torch.int64.itemsize
        tables += batch * plan.num_logical_pages * entry
    return KVBytes(full, chunked, tables)


def activation_bytes(
    target: Llama4ForCausalLM, dtype: torch.dtype, num_rows: int, all_logits: bool
) -> int:
    """Peak of what a pass over `num_rows` rows of one sequence keeps between its operations.

    `target` is a model on the meta device with Triton's operations and its taps set; `all_logits`
    of every row, as in verification, or of the last, as behind a prompt.
    """
    assign(target, planned_tensors(target, dtype), "meta")
    cache = target.allocate_cache(num_rows)
    step = cache.causal_step(num_rows)
    ids_T = torch.empty(num_rows, dtype=torch.int64, device="meta")
    rows = None if all_logits else torch.empty(1, dtype=torch.int64, device="meta")
    stored = [tensor for pool in cache.pools for tensor in (pool.k_LRCGK, pool.v_LRCGK)]
    existing: list[Tensor] = [*target.parameters(), *target.buffers(), *stored]
    with torch.inference_mode(), LiveMemory(existing) as live:
        target(ids_T, step, rows)
    return live.peak
