"""`aerie plan`: the memory of a pair from its folders, and how it is shown."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aerie.eagle3.checkpoint import OwnParts, own_parts, tensor_names
from aerie.eagle3.choice_form import EVERY_FILTER, ChoiceForm
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.memory_plan import MemoryPlan, MemoryPlanner
from aerie.eagle3.parallel_draft import check_draft_size
from aerie.eagle3.planned_pair import DraftPlan, Run
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.kernels.backend import ResolvedBackend
from aerie.llama4.config import Llama4Config, is_multimodal
from aerie.llama4.json_fields import read_json
from aerie.llama4.kv_scales import KVCacheDtype, cache_dtype
from aerie.llama4.memory_plan import weight_bytes
from aerie.llama4.quantization import Quantize, quantized_on_load, read_quantization
from aerie.llama4.sharding import WHOLE, Shard, check_shard
from aerie.llama4.stored_tensors import INDEX, SINGLE


def make_planner(
    target: Path,
    draft: Path | None,
    *,
    dtype: torch.dtype,
    kv_cache_dtype: KVCacheDtype = "auto",
    quantize: Quantize | None = None,
    quantize_linears: bool = False,
    speculation: SpeculativeConfig | None = None,
    backend: ResolvedBackend = "triton",
    with_vision: bool = True,
    shard: Shard = WHOLE,
    lag: int = 0,
    sampling: SamplingParams | None = None,
    cuda_graphs: bool = False,
) -> MemoryPlanner:
    """From the folders' configs; of tensors only headers are read, if the folders have some.

    With a `shard` the plan is that rank's, whose draft is here on rank 0 or where it is cut too.
    `lag` rounds run ahead of the host, and with `cuda_graphs` they are captured where they are
    alike. `sampling` None takes all filters and no rules.

    A multimodal target counts `with_vision` or, for prompts without images, without. Raises
    CheckpointError for what could not be loaded so either.
    """
    speculation = speculation or SpeculativeConfig()
    config = Llama4Config.from_pretrained(target)
    quantization = read_quantization(target)
    if quantize is not None:
        quantization = quantized_on_load(target, quantization, quantize, quantize_linears)
    check_shard(config, shard)
    draft_size = check_draft_size(speculation.draft_tensor_parallel_size, shard.size)
    drafted = None
    if draft is not None and (draft_size > 1 or shard.rank == 0):
        drafted = _draft_plan(draft, config, speculation)
    policy = None if draft is None else speculation.policy
    run = Run(
        dtype,
        cache_dtype(kv_cache_dtype, dtype),
        quantization,
        policy,
        backend,
        shard,
        draft_size,
        lag,
        EVERY_FILTER if sampling is None else ChoiceForm.of(sampling, config.eos_token_ids),
        cuda_graphs and speculation.cost_aware_width is None,
    )
    vision = _vision_bytes(target, dtype) if with_vision and shard.size == 1 else 0
    return MemoryPlanner(config, drafted, run, vision)


def _vision_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Of a vision tower in its own dtype, or in `dtype` where the folder has no tensors."""
    if not is_multimodal(read_json(folder / "config.json")):
        return 0
    # imports transformers' own Llama 4: seconds that text-only checkpoints do not pay
    from aerie.llama4.multimodal_config import MultimodalConfig
    from aerie.llama4.vision import VisionTower, stored_dtype

    config = MultimodalConfig.from_pretrained(folder)
    tower = VisionTower.without_values(config)
    tower.compute_rotations(config, "meta")
    own = stored_dtype(folder) if _has_tensors(folder) else dtype
    return sum(weight_bytes(tower, own).values())


def _has_tensors(folder: Path) -> bool:
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def _draft_plan(folder: Path, target: Llama4Config, speculation: SpeculativeConfig) -> DraftPlan:
    """Without tensors: an embedding of its own only where the target's would not fit."""
    config = Eagle3Config.from_pretrained(folder, target.num_hidden_layers, speculation.reading)
    if _has_tensors(folder):
        return DraftPlan(config, own_parts(tensor_names(folder), config))
    has_embedding = config.hidden_size != target.hidden_size
    return DraftPlan(config, OwnParts(has_embedding, not config.shares_target_head))


def free_memory(device: torch.device) -> int | None:
    """Bytes that a GPU has left; None for a CPU, whose memory is not planned."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has, or for a CPU the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def as_rows(plan: MemoryPlan) -> dict[str, str]:
    """Two columns for the terminal."""
    rows = {"plan for": f"{plan.context} tokens x {plan.batch}"}
    rows |= _weight_rows("target", plan.target_weights)
    if plan.draft_weights:
        rows |= _weight_rows("draft", plan.draft_weights)
    rows["KV cache, full layers"] = size(plan.kv.full)
    rows["KV cache, chunked layers"] = size(plan.kv.chunked)
    if plan.draft_weights:
        rows["KV cache, draft"] = size(plan.draft_kv.total)
    rows["page tables"] = size(plan.kv.tables)
    rows["columns of the batch"] = size(plan.columns)
    rows["activations"] = f"{size(plan.activations)}, scratch of kernels not counted"
    captured = f"at most {size(plan.cuda_graphs)}" if plan.cuda_graphs else "none"
    rows["CUDA graphs"] = captured
    rows["total"] = size(plan.total)
    return rows


def _weight_rows(name: str, weights: Mapping[str, int]) -> dict[str, str]:
    rows = {f"{name}, weights": size(sum(weights.values()))}
    return rows | {f"{name}:   {group}": size(nbytes) for group, nbytes in weights.items()}


def as_text(plan: MemoryPlan) -> str:
    """The same numbers in one line."""
    parts = {
        "target": sum(plan.target_weights.values()),
        "draft": sum(plan.draft_weights.values()),
        "KV full": plan.kv.full,
        "KV chunked": plan.kv.chunked,
        "KV draft": plan.draft_kv.total,
        "activations": plan.activations,
        "CUDA graphs": plan.cuda_graphs,
    }
    shown = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in parts.items() if nbytes)
    return f"{size(plan.total)} for {plan.context} tokens x {plan.batch} ({shown})"


def as_dict(plan: MemoryPlan) -> dict[str, Any]:
    """The object `--json` prints; all sizes in bytes."""
    return {
        "context": plan.context,
        "batch": plan.batch,
        "target_weights": dict(plan.target_weights),
        "draft_weights": dict(plan.draft_weights),
        "kv_full": plan.kv.full,
        "kv_chunked": plan.kv.chunked,
        "kv_draft": plan.draft_kv.total,
        "page_tables": plan.kv.tables,
        "columns": plan.columns,
        "activations": plan.activations,
        "cuda_graphs": plan.cuda_graphs,
        "total": plan.total,
    }


def size(nbytes: int) -> str:
    """In the units that GPU memory is sold in."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes / 2**10:.1f} KiB"
