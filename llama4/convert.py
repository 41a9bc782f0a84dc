"""An unquantised target rewritten as a compressed-tensors FP8 checkpoint.

The layout is that of llm-compressor's FP8_DYNAMIC and FP8_BLOCK schemes: every projection alone,
experts too, `weight` in e4m3 beside `weight_scale` ([N, 1], or one per block of 128 x 128), rows of
activations quantised by whoever runs it. Scales are float32, so that reading the result gives the
bits of `from_pretrained(quantize=...)` on the source. Everything else, vision parts too, is copied.

One projection (one expert of a fused tensor) is in memory at a time. The folder gets its name when
it is whole and has been read back; what an interruption leaves is removed or, if the process was
killed, hidden, named "unfinished" and mostly without a config.json, which is written last.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerie.llama4.config import Llama4Config
from aerie.llama4.experts import WHOLES
from aerie.llama4.fp8_layout import fp8_modules, hold_fp8
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import CheckpointError, read_json
from aerie.llama4.model import RENAME, Llama4ForCausalLM
from aerie.llama4.quantization import (
    KEY,
    MODELOPT_FILE,
    Quantize,
    quantized_on_load,
    read_quantization,
)
from aerie.llama4.safetensors_header import StoredTensor
from aerie.llama4.safetensors_writing import (
    Planned,
    ShardWriter,
    planned,
    shard_name,
    write_index,
)
from aerie.llama4.stored_tensors import INDEX, check_inside, stored_tensors
from aerie.llama4.tensor_reading import PIECE_BYTES, read_rows
from aerie.llama4.weight_quantization import BLOCK, quantize_weight

SHARD_BYTES = 5 * 10**9
COPIED = (".json", ".jinja", ".model", ".txt", ".md")  # tokenizer, templates, licence
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
EXCEPT = ("re:.*lm_head", "re:.*router", "re:.*vision_model", "re:.*multi_modal_projector")
LINEARS = (
    "re:.*self_attn",
    "re:.*shared_expert",
    "re:.*feed_forward[.](gate_proj|up_proj|down_proj|gate_up_proj)",
)


@dataclass(frozen=True)
class Task:
    """What comes of one source tensor, or of one expert of a fused one.

    `modules` are the projections that its rows become; none: it is copied.
    """

    source: StoredTensor
    plan: tuple[Planned, ...]
    modules: Mapping[str, int]
    expert: int | None = None


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    quantised: int  # projections, each expert's counted
    copied: int
    nbytes: int


def convert(
    source: str | Path,
    destination: Path,
    quantize: Quantize,
    linears: bool = False,
    revision: str | None = None,
) -> Converted:
    """Writes `destination`, which must not exist, from a folder or a hub id (at a `revision`).

    Raises CheckpointError, and leaves nothing.
    """
    destination = Path(destination)
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination}: exists already; name a new folder")
    if not destination.parent.is_dir():
        raise CheckpointError(f"{destination.parent}: no such folder to write into")
    folder = resolve_folder(source, revision)
    tasks = list(_tasks(folder, quantize, linears))
    unfinished = destination.with_name(f".{destination.name}.unfinished-{os.getpid()}")
    unfinished.mkdir()
    try:
        _write(folder, unfinished, tasks, quantization_config(quantize, linears))
        _read_back(unfinished)
        unfinished.rename(destination)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    quantised = sum(len(task.modules) for task in tasks)
    nbytes = sum(tensor.nbytes for task in tasks for tensor in task.plan)
    copied = sum(not task.modules for task in tasks)
    return Converted(destination, quantised, copied, nbytes)


def quantization_config(quantize: Quantize, linears: bool) -> dict[str, Any]:
    """What config.json says of the result, as compressed-tensors defines it."""
    if quantize == "fp8":
        weights, inputs = {"strategy": "channel"}, {"strategy": "token"}
    else:
        weights = {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        inputs = {"strategy": "group", "group_size": BLOCK}
    group = {
        "targets": ["Linear"],
        "weights": FLOAT8 | weights | {"dynamic": False},
        "input_activations": FLOAT8 | inputs | {"dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [*EXCEPT, *(() if linears else LINEARS)],
        "kv_cache_scheme": None,
    }


def _tasks(folder: Path, quantize: Quantize, linears: bool) -> Iterator[Task]:
    """All of the source, from its headers alone."""
    quantization = quantized_on_load(folder, read_quantization(folder), quantize, linears)
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4Config.from_pretrained(folder), "eager")
        hold_fp8(model, quantization)
    alone = fp8_modules(model)
    for source in stored_tensors(folder):
        name = RENAME(source.name)
        owner, _, leaf = source.name.rpartition(".")
        if name is None:
            yield _copied(source)
        elif owner.endswith(".experts") and leaf in WHOLES and len(source.shape) == 3:
            yield from _fused(source, owner, leaf, quantize)
        elif leaf == "weight" and (name.removesuffix(".weight") in alone or ".experts." in name):
            modules = {owner: source.shape[0]}
            yield Task(source, _plan(modules, source.shape[-1], quantize), modules)
        else:
            yield _copied(source)


def _fused(source: StoredTensor, owner: str, whole: str, quantize: Quantize) -> Iterator[Task]:
    experts, depth, rows = source.shape
    parts = ("gate_proj", "up_proj") if whole == "gate_up_proj" else ("down_proj",)
    for e in range(experts):
        modules = {f"{owner}.{e}.{part}": rows // len(parts) for part in parts}
        yield Task(source, _plan(modules, depth, quantize), modules, e)


def _plan(modules: Mapping[str, int], depth: int, quantize: Quantize) -> tuple[Planned, ...]:
    plan = []
    for module, rows in modules.items():
        scale = (rows, 1) if quantize == "fp8" else (-(-rows // BLOCK), -(-depth // BLOCK))
        plan.append(planned(f"{module}.weight", torch.float8_e4m3fn, (rows, depth)))
        plan.append(planned(f"{module}.weight_scale", torch.float32, scale))
    return tuple(plan)


def _copied(source: StoredTensor) -> Task:
    return Task(source, (Planned(source.name, source.kind, source.shape),), {})


def _write(folder: Path, unfinished: Path, tasks: list[Task], config: dict[str, Any]) -> None:
    shards = _shards(tasks)
    plans = [[tensor for task in shard for tensor in task.plan] for shard in shards]
    for number, (shard, plan) in enumerate(zip(shards, plans, strict=True)):
        with (unfinished / shard_name(number, len(shards))).open("wb") as file:
            writer = ShardWriter(file, plan)
            for task in shard:
                _run(task, writer)
            writer.finish()
    write_index(unfinished, plans)
    for file in sorted(folder.iterdir()):
        skipped = file.name in ("config.json", INDEX, MODELOPT_FILE)
        if file.is_file() and file.suffix in COPIED and not skipped:
            check_inside(folder, file)
            shutil.copyfile(file, unfinished / file.name)
    values = read_json(folder / "config.json") | {KEY: config}
    (unfinished / "config.json").write_text(json.dumps(values, indent=2))


def _shards(tasks: list[Task]) -> list[list[Task]]:
    shards, size = [[]], 0
    for task in tasks:
        nbytes = sum(tensor.nbytes for tensor in task.plan)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(task)
        size += nbytes
    return shards


def _run(task: Task, writer: ShardWriter) -> None:
    if not task.modules:
        return _copy_bytes(task.source, writer)
    weight = _weight(task)
    scales = [tensor.shape for tensor in task.plan if tensor.name.endswith(".weight_scale")]
    first = 0
    for (module, rows), shape in zip(task.modules.items(), scales, strict=True):
        codes = torch.empty(rows, weight.shape[1], dtype=torch.float8_e4m3fn)
        scale = torch.empty(shape, dtype=torch.float32)
        quantize_weight(weight[first : first + rows], codes, scale)
        writer.write(f"{module}.weight", codes)
        writer.write(f"{module}.weight_scale", scale)
        first += rows


def _weight(task: Task) -> Tensor:
    """Output-major, whatever the source has."""
    if task.expert is None:
        return read_rows(task.source, 0, task.source.shape[0])
    return read_rows(task.source, task.expert, task.expert + 1)[0].mT


def _copy_bytes(source: StoredTensor, writer: ShardWriter) -> None:
    with source.file.open("rb") as file:
        file.seek(source.offset)
        for offset in range(0, source.nbytes, PIECE_BYTES):
            data = file.read(min(PIECE_BYTES, source.nbytes - offset))
            writer.write_bytes(source.name, offset, data)


def _read_back(folder: Path) -> None:
    """Every tensor there, in its place and finite: a damaged source is found here too."""
    Llama4ForCausalLM.from_pretrained(folder, device="meta", backend="eager")
