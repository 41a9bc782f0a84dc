"""One run of `aerie generate`: what was asked for, the loaded pair, and what came out."""

import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch.distributed import ProcessGroup

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.ends import FinishReason
from aerie.eagle3.generate import MAX_BATCH_SIZE, Decoding, Generation, generate
from aerie.eagle3.parallel_draft import RemoteDraft, load_parallel_draft
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Burst
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.eagle3.stats import Stats
from aerie.images import read_image
from aerie.kernels.backend import Backend, resolve
from aerie.llama4.checkpoint import Progress
from aerie.llama4.config import is_multimodal
from aerie.llama4.expert_counts import counted_experts
from aerie.llama4.hub import resolve_folder
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.json_fields import read_json
from aerie.llama4.kv_scales import KVCacheDtype
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.quantization import Quantize
from aerie.llama4.sharding import Shard
from aerie.plan import as_text, free_memory, make_planner
from aerie.progress import loading, reading_prompt
from aerie.prompting import Asked, Prompt, prepare
from aerie.ranks import rank
from aerie.text import TextStream, load_tokenizer

if TYPE_CHECKING:
    from aerie.llama4.conditional_generation import Llama4ForConditionalGeneration


DRAFT_SEES = {
    "merged": 'The draft sees image features ("draft_multimodal": "merged").',
    "text": 'The draft sees placeholders as text ("draft_multimodal": "text").',
}


@dataclass(frozen=True)
class Request:
    """A checked request (`commands/generate_options.py`)."""

    model: str | Path
    revision: str | None
    draft: str | Path | None
    draft_revision: str | None
    prompt: str
    max_new_tokens: int
    sampling: SamplingParams
    bad_words: tuple[str, ...]
    speculation: SpeculativeConfig
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    kv_cache_dtype: KVCacheDtype
    quantize: Quantize | None
    quantize_linears: bool
    check: bool
    count_experts: bool = False
    images: tuple[Path, ...] = ()
    chat: bool = False
    lazy_vision: bool = False
    prompts: tuple[Asked, ...] = ()  # of a batch; `prompt` is the first
    max_batch_size: int = MAX_BATCH_SIZE
    memory_fraction: float | None = None
    tensor_parallel_size: int = 1
    expert_parallel: bool = False


@dataclass(frozen=True)
class Loaded:
    """The pair, the target's tokenizer, and the prompt (or those of a batch) as the target reads
    it."""

    target: "Llama4ForCausalLM | Llama4ForConditionalGeneration"
    draft: Eagle3Llama4ForCausalLM | RemoteDraft | None
    tokenizer: Tokenizer
    prompt: Prompt
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """`identical` is None unless the plain tokens were decoded for comparison."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats
    plain_tokens: list[int] | None
    plain_stats: Stats | None
    seed: int | None = None  # of a sampled run
    distinct_experts: dict[int, float] | None = None  # a layer, by rows of a pass, if counted

    @property
    def identical(self) -> bool | None:
        return None if self.plain_tokens is None else self.plain_tokens == self.tokens


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
    _plan(request, folder, drafts, longest, console)
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
        return Loaded(target, None, tokenizer, prompt, prompts)
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
    return Loaded(target, draft, tokenizer, prompt, prompts)


def _plan(
    request: Request, folder: Path, draft: Path | None, num_prompt_ids: int, console: Console
) -> None:
    """Raises ValueError where what is asked cannot fit into the memory that a GPU has left."""
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
    )
    wanted = num_prompt_ids + request.max_new_tokens
    batch = max(1, min(request.max_batch_size, len(request.prompts)))
    found = planner.plan(max(1, min(wanted, planner.target.max_position_embeddings)), batch)
    console.print(f"memory: {as_text(found)}", markup=False, soft_wrap=True)
    memory = free_memory(request.device)
    if memory is not None:
        planner.check(found, memory, f"what {request.device} has left")


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


def run(
    request: Request, loaded: Loaded, on_text: Callable[[str], None] | None, console: Console
) -> Outcome:
    """Decodes; `on_text` receives the text as its tokens are accepted. `console` shows how far a
    long prompt has been read."""
    images = image_features(loaded, loaded.prompt)
    target = loaded.target.get_language_model()
    sampling = with_bad_words(request, loaded.tokenizer)
    decoding = Decoding(
        target,
        loaded.prompt.ids,
        request.max_new_tokens,
        loaded.draft,
        kv_cache_dtype=request.kv_cache_dtype,
        policy=request.speculation.policy_on(target, loaded.draft),
        sampling=sampling,
        detokenize=loaded.tokenizer.decode,
        images=images,
    )
    stream, bursts = TextStream(loaded.tokenizer, sampling.stop_strings), iter(decoding)
    with reading_prompt(len(loaded.prompt.ids), console) as decoding.decoded.on_prefill:
        first = list(itertools.islice(bursts, 1))  # the prompt's passes are not counted
    _show(stream, first, on_text)
    counting = counted_experts(target) if request.count_experts else nullcontext()
    with counting as counts:
        _show(stream, bursts, on_text)
    if on_text is not None:
        on_text(stream.flush())
    assert decoding.finish_reason is not None
    plain = _plain(request, loaded, images, sampling) if request.check else None
    return Outcome(
        text=stream.text,
        tokens=decoding.tokens,
        finish_reason=decoding.finish_reason,
        stats=decoding.stats,
        plain_tokens=plain and plain.tokens,
        plain_stats=plain and plain.stats,
        seed=None if sampling.is_greedy else decoding.seed,
        distinct_experts=counts and counts.read(),
    )


def _show(
    stream: TextStream, bursts: Iterable[Burst], on_text: Callable[[str], None] | None
) -> None:
    for burst in bursts:
        text = stream.add(burst.tokens)
        if on_text is not None and text:
            on_text(text)


def _plain(
    request: Request, loaded: Loaded, images: ImageFeatures | None, sampling: SamplingParams
) -> Generation:
    return generate(
        loaded.target,
        loaded.prompt.ids,
        request.max_new_tokens,
        kv_cache_dtype=request.kv_cache_dtype,
        sampling=sampling,
        detokenize=loaded.tokenizer.decode,
        images=images,
    )


def image_features(loaded: Loaded, prompt: Prompt) -> ImageFeatures | None:
    """One pass of the vision tower over a prompt's tiles; placeholders without one are refused.

    Raises ValueError with both numbers.
    """
    target = loaded.target
    if isinstance(target, Llama4ForCausalLM):
        return None
    return target.image_features(prompt.ids, prompt.pixel_values)


def with_bad_words(request: Request, tokenizer: Tokenizer) -> SamplingParams:
    """A word is other tokens at the start of a text than behind a space: both are forbidden."""
    words = [text for word in request.bad_words for text in (word, f" {word}")]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in words]
    return replace(request.sampling, bad_words_ids=ids)


def device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: {name!r} is no device ({error})") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: supported are cpu and cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name!r} asked, {torch.cuda.device_count()} GPUs are present")
    return device


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
