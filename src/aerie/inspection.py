"""`aerie inspect`: what a checkpoint is, how it would be read, what it takes, and its faults.

Nothing is allocated for weights: the module is built on the meta device and every tensor is read
through the strict loader, values included.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from aerie.eagle3.architectures import EAGLE3_KEYS, architecture
from aerie.eagle3.binding import check_fits, sharing_decisions
from aerie.eagle3.checkpoint import (
    check_is_dense,
    check_is_unquantised,
    optional_tensors,
    own_parts,
    read_vocabulary_map,
    renaming,
    tensor_names,
)
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.formats import LAYER_KEY, flatten
from aerie.eagle3.memory_plan import CONTEXT, MemoryPlan
from aerie.eagle3.reading import Decision
from aerie.eagle3.rows import lag_on
from aerie.kernels.head_rows import ids_from_offsets
from aerie.llama4.checkpoint import LoadOptions, load_weights
from aerie.llama4.config import Llama4Config, is_multimodal
from aerie.llama4.json_fields import CheckpointError, read_json, strings
from aerie.llama4.memory_plan import kv_bytes
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.safetensors_header import StoredTensor
from aerie.llama4.stored_tensors import stored_tensors
from aerie.llama4.tensor_groups import NAMES, group_of
from aerie.plan import make_planner, size

T = TypeVar("T")
USUAL_DEPTH = 48  # Scout's and Maverick's, where no target is given


@dataclass(frozen=True)
class Group:
    """Tensors of one kind: how many values of which type, and their bytes as stored."""

    values: Mapping[str, int]
    nbytes: int


@dataclass
class Inspection:
    """Everything that could be found out; what could not be is among the problems."""

    folder: Path
    kind: Literal["target", "draft"]
    facts: dict[str, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    groups: dict[str, Group] = field(default_factory=dict)
    memory: MemoryPlan | None = None  # of the target, or the pair, in bfloat16 on a GPU
    problems: list[str] = field(default_factory=list)

    @property
    def num_values(self) -> int:
        return sum(sum(group.values.values()) for group in self.groups.values())

    @property
    def weight_bytes(self) -> int:
        return sum(group.nbytes for group in self.groups.values())

    def attempt(self, read: Callable[[], T]) -> T | None:
        """What `read` returns; its complaints join the problems, each once."""
        try:
            return read()
        except (CheckpointError, OSError) as error:
            lines = str(error).split("\n  ")
            self.problems += [line for line in lines if line not in self.problems]
            return None


def inspect(folder: Path, target: Path | None, context: int | None, batch: int) -> Inspection:
    """Looks at a target or, where the config is one, at an Eagle3 draft for `target`.

    Memory is planned for `batch` sequences of `context` tokens, None for 8192 or the most that the
    target has. Raises ValueError for a plan of something else; what is wrong with the files is in
    the result.
    """
    if batch < 1 or (context is not None and context < 1):
        raise ValueError(f"--context, --batch: must be at least 1, got {context} and {batch}")
    found = Inspection(folder, "target")
    values = found.attempt(lambda: read_json(folder / "config.json"))
    stored = found.attempt(lambda: stored_tensors(folder)) or []
    found.groups = _groups(stored)
    if values is None:
        return found
    if "auto_map" in values:
        found.facts["auto_map"] = "present and ignored: nothing in a checkpoint is ever imported"
    if _is_draft(values):
        found.kind = "draft"
        config = _inspect_draft(found, values, target, bool(stored))
        if config is not None and target is None:
            found.facts["KV cache"] = _kv_of_draft(config, context or CONTEXT, batch)
    else:
        _inspect_target(found, values, bool(stored))
    pair = (target, folder) if found.kind == "draft" else (folder, None)
    if pair[0] is not None and not found.problems:
        found.memory = _memory(pair[0], pair[1], context, batch)
    return found


def _kv_of_draft(config: Eagle3Config, context: int, batch: int) -> str:
    kv = kv_bytes([config.attention], context, batch, torch.bfloat16)
    return f"{size(kv.total)} for {context} tokens x {batch} of the draft alone, in bfloat16"


def _memory(target: Path, draft: Path | None, context: int | None, batch: int) -> MemoryPlan:
    planner = make_planner(
        target, draft, dtype=torch.bfloat16, backend="eager", lag=lag_on(torch.device("cuda"))
    )
    return planner.plan(planner.usual_context if context is None else context, batch)


def _is_draft(values: Mapping[str, Any]) -> bool:
    if {LAYER_KEY, "speculators_model_type", *EAGLE3_KEYS} & values.keys():
        return True
    names = values.get("architectures")
    return isinstance(names, list) and any("Eagle3" in str(name) for name in names)


def _inspect_target(found: Inspection, values: Mapping[str, Any], has_tensors: bool) -> None:
    config = found.attempt(lambda: Llama4Config.from_pretrained(found.folder))
    names = found.attempt(lambda: strings(values, "architectures")) or ()
    found.facts["architecture"] = ", ".join(names)
    if config is None:
        return
    depth = config.num_hidden_layers
    chunked = f"{sum(config.chunked_layers)} chunked at {config.attention_chunk_size}"
    found.facts |= {
        "layers": f"{depth}: {len(config.moe_layers)} with experts, {chunked}, "
        f"{depth - sum(config.no_rope_layers)} without RoPE",
        "experts": f"{config.num_local_experts}, {config.num_experts_per_tok} per token",
        "vocabulary": str(config.vocab_size),
        "context": str(config.max_position_embeddings),
    }
    if has_tensors:
        found.attempt(
            lambda: Llama4ForCausalLM.from_pretrained(found.folder, torch.float32, "meta", "eager")
        )
    if is_multimodal(values):
        _inspect_vision(found, has_tensors)


def _inspect_vision(found: Inspection, has_tensors: bool) -> None:
    # transformers' own Llama 4 takes seconds to import: not for text-only checkpoints
    from aerie.llama4.multimodal_config import MultimodalConfig
    from aerie.llama4.vision import VisionTower

    config = found.attempt(lambda: MultimodalConfig.from_pretrained(found.folder))
    if config is None:
        return
    found.facts["images"] = (
        f"tiles of {config.image_size} px, {config.tokens_per_tile} tokens each "
        f"(id {config.image_token_id}, between {config.boi_token_id} and {config.eoi_token_id})"
    )
    if has_tensors:
        found.attempt(lambda: VisionTower.check(found.folder, config))


def _inspect_draft(
    found: Inspection, values: Mapping[str, Any], folder: Path | None, has_tensors: bool
) -> Eagle3Config | None:
    target = folder and found.attempt(lambda: Llama4Config.from_pretrained(folder))
    depth = target.num_hidden_layers if target else USUAL_DEPTH
    if folder is None:
        found.facts["target"] = f"none given (--target): {depth} layers assumed, fit not checked"
    named = found.attempt(lambda: architecture(flatten(values)))
    if named is not None:
        found.facts["architecture"] = named.name
    config = found.attempt(lambda: Eagle3Config.from_hf(values, depth))
    if config is None:
        return None
    found.decisions = (*config.decisions, *_readings(config))
    if has_tensors:
        _inspect_draft_tensors(found, config, target)
    return config


def _inspect_draft_tensors(
    found: Inspection, config: Eagle3Config, target: Llama4Config | None
) -> None:
    folder = found.folder
    names = found.attempt(lambda: tensor_names(folder))
    if names is None:
        return
    parts = found.attempt(lambda: own_parts(names, config))
    if parts is None:
        return
    with torch.device("meta"):
        draft = Eagle3Llama4ForCausalLM(config, "eager", "meta", parts)
    found.attempt(lambda: check_is_dense(names))
    found.attempt(lambda: check_is_unquantised(names))
    found.attempt(
        lambda: load_weights(
            draft,
            folder,
            renaming(parts, config),
            LoadOptions(torch.float32, "meta", optional_tensors(config)),
        )
    )
    d2t_U = found.attempt(lambda: read_vocabulary_map(folder, config))
    if d2t_U is not None:
        share = config.draft_vocab_size / config.vocab_size
        ids_U = ids_from_offsets(d2t_U)
        found.facts["vocabulary map"] = (
            f"{config.draft_vocab_size} of {config.vocab_size} target ids ({share:.1%}), "
            f"{int(ids_U[0])} to {int(ids_U[-1])}"
        )
    if target is not None:
        found.attempt(lambda: check_fits(config, parts, target))
        found.decisions += sharing_decisions(config, parts, target)
        with torch.device("meta"):
            empty = Llama4ForCausalLM(target, "eager", "meta")
        found.attempt(lambda: draft.tap_layers(empty))


def _readings(config: Eagle3Config) -> tuple[Decision, ...]:
    """The conventions that are read but seldom written."""
    layout = config.attention.rotary_layout or "none (NoPE)"
    by_kind = f"of the {config.layer_kind} layer"
    return (
        Decision("RoPE pairs", layout, by_kind),
        Decision("norm_before_residual", str(config.norm_before_residual).lower(), "as read"),
        Decision("norm_output", str(config.norm_output).lower(), "as read"),
        Decision("norm in front of fc", config.feature_norm, "as read"),
    )


def _groups(stored: Sequence[StoredTensor]) -> dict[str, Group]:
    found: dict[str, list[StoredTensor]] = {}
    for tensor in stored:
        found.setdefault(group_of(tensor.name), []).append(tensor)
    return {name: _group(found[name]) for name in NAMES if name in found}


def _group(tensors: Sequence[StoredTensor]) -> Group:
    values: dict[str, int] = {}
    for tensor in tensors:
        values[tensor.kind] = values.get(tensor.kind, 0) + torch.Size(tensor.shape).numel()
    return Group(values, sum(tensor.nbytes for tensor in tensors))
