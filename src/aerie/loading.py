"""Reading what a request names: memory is planned first, then target and draft are loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch.distributed import ProcessGroup

from aerie.eagle3.budget import Budget
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.memory_plan import GIB
from aerie.eagle3.parallel_draft import RemoteDraft, load_parallel_draft
from aerie.eagle3.rows import lag_on
from aerie.images import read_image
from aerie.kernels.backend import Backend, resolve
from aerie.llama4.checkpoint import Progress
from aerie.llama4.config import is_multimodal
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import read_json
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.quantization import Quantize
from aerie.llama4.sharding import Shard
from aerie.plan import as_text, free_memory, make_planner, total_memory
from aerie.progress import loading
from aerie.prompting import Prompt, prepare
from aerie.ranks import rank
from aerie.request import Request
from aerie.text import load_tokenizer

if TYPE_CHECKING:
    from aerie.llama4.conditional_generation import Llama4ForConditionalGeneration

DRAFT_SEES = {
    "merged": 'The draft sees image features ("draft_multimodal": "merged").',
    "text": 'The draft sees placeholders as text ("draft_multimodal": "text").',
}


@dataclass(frozen=True)
class Loaded:
    """The pair, the target's tokenizer, and the prompt (or those of a batch) as the target reads
    it."""

    target: "Llama4ForCausalLM | Llama4ForConditionalGeneration"
    draft: Eagle3Llama4ForCausalLM | RemoteDraft | None
    tokenizer: Tokenizer
    prompt: Prompt
    prompts: tuple[Prompt, ...] = ()
    budget: Budget = Budget()


def load(request: Request, console: Console, group: ProcessGroup | None = None) -> Loaded:
    """Reads target, draft and tokenizer, and says on `console` what memory they will take.

    With a `group` this process is one of its ranks, and holds its part of the target.

    Raises CheckpointError, and ValueError, before anything is read, where they would not fit.
    """
    images = [read_image(path) for path in request.images]
    batch_images = [[read_image(path) for path in asked.images] for asked in request.prompts]
    has_images = bool(images) or any(batch_images)
    folder = resolve_folder(request.model, request.revision)
    drafts = None
    if request.draft is not None:
        drafts = resolve_folder(request.draft, request.draft_revision)
    tokenizer = load_tokenizer(folder)
    prompt = prepare(request.prompt, tokenizer, folder, images, request.chat)
    prompts = tuple(
        prepare(asked.text, tokenizer, folder, pictures, request.chat)
        for asked, pictures in zip(request.prompts, batch_images, strict=True)
    )
    longest = max(len(one.ids) for one in (prompt, *prompts))
    budget = _plan(request, folder, drafts, tokenizer, longest, console)
    if group is not None and has_images:
        raise ValueError("images: a target that is cut over ranks reads none; use one process")
    with loading("target", console) as progress:
        target = load_target(
            folder,
            request.device,
            request.dtype,
            request.backend,
            request.quantize,
            request.quantize_linears,
            progress,
            lazy_vision=request.lazy_vision or not has_images,
            group=group,
            expert_parallel=request.expert_parallel,
        )
    if drafts is None:
        return Loaded(target, None, tokenizer, prompt, prompts, budget)
    with loading("draft", console) as progress:
        draft = load_parallel_draft(
            drafts,
            target,
            reading=request.speculation.reading,
            tensor_parallel_size=request.speculation.draft_tensor_parallel_size,
            progress=progress,
        )
    if has_images and isinstance(draft, Eagle3Llama4ForCausalLM):
        console.print(DRAFT_SEES[draft.config.draft_multimodal], markup=False, soft_wrap=True)
    return Loaded(target, draft, tokenizer, prompt, prompts, budget)


def _plan(
    request: Request,
    folder: Path,
    draft: Path | None,
    tokenizer: Tokenizer,
    num_prompt_ids: int,
    console: Console,
) -> Budget:
    """Raises ValueError where what is asked cannot fit into `--memory-fraction` of the device, or
    into what a GPU has left."""
    planner = make_planner(
        folder,
        draft,
        dtype=request.dtype,
        kv_cache_dtype=request.kv_cache_dtype,
        quantize=request.quantize,
        quantize_linears=request.quantize_linears,
        speculation=request.speculation,
        backend=resolve(request.backend, request.device),
        shard=Shard(rank(), request.tensor_parallel_size, request.expert_parallel),
        with_vision=bool(request.images) or any(asked.images for asked in request.prompts),
        lag=lag_on(request.device),
        sampling=request.sampling_with(tokenizer),
        cuda_graphs=request.cuda_graphs,
    )
    wanted = num_prompt_ids + request.max_new_tokens
    batch = max(1, min(request.max_batch_size, len(request.prompts)))
    found = planner.plan(max(1, min(wanted, planner.target.max_position_embeddings)), batch)
    console.print(f"memory: {as_text(found)}", markup=False, soft_wrap=True)
    limits, kv_cache_bytes = [], None
    if request.memory_fraction is not None:
        total = total_memory(request.device)
        origin = f"--memory-fraction {request.memory_fraction} of {total / GIB:.2f} GiB"
        limits.append((int(request.memory_fraction * total), origin))
    free = free_memory(request.device)
    if free is not None:
        limits.append((free, f"what {request.device} has left"))
    if request.memory_fraction is None:  # all of the batch at a time, or nothing
        for memory, origin in limits:
            planner.check(found, memory, origin)
    else:
        kv_cache_bytes = min(planner.kv_cache_bytes(found, *limit) for limit in limits)
    # where no round can be captured that is still asked for: the rounds will say why not
    return Budget(kv_cache_bytes, max(1, found.cuda_graphs) if request.cuda_graphs else 0)


def load_target(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    quantize: Quantize | None = None,
    quantize_linears: bool = False,
    progress: Progress | None = None,
    lazy_vision: bool = False,
    group: ProcessGroup | None = None,
    expert_parallel: bool = False,
) -> "Llama4ForCausalLM | Llama4ForConditionalGeneration":
    """Reads a target onto its device; of one that is cut, the text part. Raises CheckpointError."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches
    if group is None and is_multimodal(read_json(folder / "config.json")):
        # imports transformers' own Llama 4: seconds that text-only checkpoints do not pay
        from aerie.llama4.conditional_generation import Llama4ForConditionalGeneration

        return Llama4ForConditionalGeneration.from_pretrained(
            folder,
            dtype,
            device,
            backend,
            quantize=quantize,
            quantize_linears=quantize_linears,
            progress=progress,
            lazy_vision=lazy_vision,
        )
    return Llama4ForCausalLM.from_pretrained(
        folder,
        dtype,
        device,
        backend,
        quantize=quantize,
        quantize_linears=quantize_linears,
        progress=progress,
        group=group,
        expert_parallel=expert_parallel,
    )
