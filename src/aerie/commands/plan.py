"""`aerie plan`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from aerie import embedded, traffic
from aerie.commands.generate_options import KVCacheDtypeName, QuantizeName
from aerie.commands.shared import (
    DraftOption,
    DraftRevisionOption,
    DtypeName,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    draft_revision,
    exit_code_2_on_bad_input,
    stdout,
)
from aerie.eagle3.memory_plan import CONTEXT, GIB
from aerie.eagle3.rows import lag_on
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.llama4.hub import resolve_folder
from aerie.llama4.sharding import Shard
from aerie.plan import as_dict, as_rows, free_memory, make_planner, size
from aerie.report import key_value_table
from aerie.request import check_can_capture, dtype_named

GPU = torch.device("cuda")


@dataclass(frozen=True)
class PlanOptions:
    model: ModelOption = None
    draft: DraftOption = None
    context: Annotated[
        int | None,
        typer.Option(help=f"Tokens per sequence, prompt included. Default: {CONTEXT}."),
    ] = None
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1
    memory: Annotated[
        float | None, typer.Option(help="GiB to fit into. Default: what the local GPU has left.")
    ] = None
    speculative_config: Annotated[str, typer.Option(help="JSON, as for generate.")] = "{}"
    dtype: DtypeOption = DtypeName.bfloat16
    kv_cache_dtype: Annotated[
        KVCacheDtypeName, typer.Option(help="Of the keys and values. auto: the dtype.")
    ] = KVCacheDtypeName.auto
    quantize: Annotated[
        QuantizeName | None, typer.Option(help="Plan for experts made FP8 while they are read.")
    ] = None
    quantize_linears: Annotated[
        bool, typer.Option("--quantize-linears", help="The other projections too.")
    ] = False
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Plan one rank (with the draft) of so many, and their traffic.")
    ] = 1
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Experts dealt out whole.")
    ] = False
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="With rounds that are captured.")
    ] = False
    revision: RevisionOption = None
    draft_revision: DraftRevisionOption = None
    as_json: JsonOption = False


def plan(options: PlanOptions) -> None:
    """What a pair takes in GPU memory, from its configs; exit code 2 where it does not fit."""
    with exit_code_2_on_bad_input():
        memory, origin = _memory(options)
        if options.cuda_graphs:
            check_can_capture(GPU, "triton", options.tensor_parallel_size)
        speculation = SpeculativeConfig.from_json(options.speculative_config)
        draft = _draft(options, speculation)
        pin = draft_revision(options.draft_revision, speculation)
        planner = make_planner(
            resolve_folder(options.model or embedded.TARGET, options.revision, with_weights=False),
            None if draft is None else resolve_folder(draft, pin, with_weights=False),
            dtype=dtype_named(options.dtype.value, GPU),
            kv_cache_dtype=options.kv_cache_dtype.value,
            quantize=None if options.quantize is None else options.quantize.value,
            quantize_linears=options.quantize_linears,
            speculation=speculation,
            shard=Shard(0, options.tensor_parallel_size, options.expert_parallel),
            lag=lag_on(GPU),
            cuda_graphs=options.cuda_graphs,
        )
        context = planner.usual_context if options.context is None else options.context
        found = planner.plan(context, options.batch)
        told = traffic.traffic_of(planner, speculation, options.batch)
        if options.as_json:
            told = {"communication": traffic.as_dict(told)} if told else {}
            print(json.dumps(as_dict(found) | {"memory": memory} | told))
        else:
            rows = as_rows(found) | {"memory": f"{size(memory)}, {origin}" if memory else origin}
            rows |= traffic.as_rows(told)
            stdout.print(key_value_table(rows))
        if memory is not None:
            planner.check(found, memory, origin)


def _draft(options: PlanOptions, speculation: SpeculativeConfig) -> str | Path | None:
    """As for `generate`: an option, the speculative config's key, or the embedded one."""
    if options.draft and speculation.model:
        raise ValueError("--draft and the speculative config's 'model' name two drafts")
    own = None if options.model else embedded.DRAFT
    return options.draft or speculation.model or own


def _memory(options: PlanOptions) -> tuple[int | None, str]:
    """Bytes to fit into, if they are known, and what they are."""
    if options.memory is not None:
        if not 0 < options.memory < 2**20:
            raise ValueError(f"--memory: must be a positive number of GiB, got {options.memory}")
        return int(options.memory * GIB), "--memory"
    if torch.cuda.is_available():
        return free_memory(GPU), "what the local GPU has left"
    return None, "not compared: no GPU here, no --memory given"
