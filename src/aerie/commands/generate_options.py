"""The options of `aerie generate`, and the request they make. Nothing is loaded here."""

import json
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aerie import embedded
from aerie.commands.shared import (
    BackendName,
    BackendOption,
    DeviceOption,
    DraftOption,
    DraftRevisionOption,
    DtypeName,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    draft_revision,
)
from aerie.eagle3.generate import MAX_BATCH_SIZE
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.prompting import Asked
from aerie.ranks import rank_device
from aerie.request import Request, check_can_capture, device_named, dtype_named


class KVCacheDtypeName(StrEnum):
    auto = "auto"
    fp8 = "fp8"


class QuantizeName(StrEnum):
    fp8 = "fp8"
    fp8_block = "fp8_block"


@dataclass(frozen=True)
class GenerateOptions:
    model: ModelOption = None
    draft: DraftOption = None
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="One text, or a JSON list to be decoded side by side, of texts or "
            '{"prompt": text, "images": [files]}.'
        ),
    ] = None
    lines: Annotated[
        bool, typer.Option("--lines", help="Every line of the prompt file is a prompt.")
    ] = False
    max_batch_size: Annotated[
        int, typer.Option(help="So many prompts of a list run at a time.")
    ] = MAX_BATCH_SIZE
    memory_fraction: Annotated[
        float | None,
        typer.Option(help="Of the GPU's memory, or of the host's: weights, caches and graphs."),
    ] = None
    cuda_graphs: Annotated[
        bool,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Capture rounds at start-up, within the memory that aerie plan says.",
        ),
    ] = False
    image: Annotated[
        list[Path] | None,
        typer.Option(help='Goes to a "<|image|>" of the prompt, or before it; may be repeated.'),
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message, in Llama 4's format.")
    ] = False
    lazy_vision: Annotated[
        bool, typer.Option("--lazy-vision", help="Read the vision tower at the first image.")
    ] = False
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128
    speculative_config: Annotated[
        str | None,
        typer.Option(help='JSON, e.g. {"method": "eagle3", "num_speculative_tokens": 4}'),
    ] = None
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest; 0: off.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep the likeliest of this mass.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Keep what is this likely next to the best.")] = 0.0
    seed: Annotated[int | None, typer.Option(help="Repeats a sampled run. Default: any.")] = None
    repetition_penalty: Annotated[float, typer.Option(help="Of prompt and output; 1: off.")] = 1.0
    presence_penalty: Annotated[float, typer.Option(help="Of output; 0: off.")] = 0.0
    frequency_penalty: Annotated[float, typer.Option(help="Of output, per use; 0: off.")] = 0.0
    min_tokens: Annotated[int, typer.Option(help="No end before this many tokens.")] = 0
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End at this token; may be repeated.")
    ] = None
    bad_word: Annotated[
        list[str] | None, typer.Option(help="Never write this text's tokens; may be repeated.")
    ] = None
    logit_bias: Annotated[
        str | None, typer.Option(help='Added to logits: JSON, e.g. {"17": -5}')
    ] = None
    revision: RevisionOption = None
    draft_revision: DraftRevisionOption = None
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Plain decoding.")] = False
    backend: BackendOption = BackendName.auto
    device: DeviceOption = "auto"
    dtype: DtypeOption = DtypeName.auto
    kv_cache_dtype: Annotated[
        KVCacheDtypeName, typer.Option(help="Of the keys and values. auto: the dtype.")
    ] = KVCacheDtypeName.auto
    quantize: Annotated[
        QuantizeName | None,
        typer.Option(help="Make the target's experts FP8 while they are read."),
    ] = None
    quantize_linears: Annotated[
        bool, typer.Option("--quantize-linears", help="The other projections too.")
    ] = False
    check: Annotated[
        bool, typer.Option("--check", help="Also decode without the draft and compare the ids.")
    ] = False
    count_experts: Annotated[
        bool, typer.Option("--count-experts", help="Count the distinct experts of every pass.")
    ] = False
    plot: Annotated[
        Path | None, typer.Option(help="Draw acceptance and time per round; needs aerie\\[plot].")
    ] = None
    tensor_parallel_size: Annotated[
        int, typer.Option(help="Cuts the target over the processes that torchrun started.")
    ] = 1
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Deal experts out whole, not their widths.")
    ] = False
    as_json: JsonOption = False

    def request(self) -> Request:
        """Resolves defaults. Raises ValueError naming what is wrong."""
        sampling = self._sampling()
        prompts = self._prompts()
        bad_words = tuple(self.bad_word or ())
        if not all(bad_words):
            raise ValueError("--bad-word: must be a text of at least one character")
        if self.no_draft and (self.draft is not None or self.speculative_config is not None):
            raise ValueError("--no-draft contradicts --draft and --speculative-config")
        if self.quantize_linears and self.quantize is None:
            raise ValueError("--quantize-linears: needs --quantize fp8 or fp8_block")
        fraction = self.memory_fraction
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"--memory-fraction: must be in (0, 1], got {fraction}")
        speculation = SpeculativeConfig.from_json(
            "{}" if self.speculative_config is None else self.speculative_config
        )
        if self.check and speculation.verification == "rejection" and not sampling.is_greedy:
            raise ValueError(
                "--check: compares ids, of which verification by rejection keeps the distribution "
                "alone; leave out one of the two, or the temperature"
            )
        draft, device = self._draft(speculation), rank_device(device_named(self.device))
        if self.cuda_graphs:
            check_can_capture(device, self.backend.value, self.tensor_parallel_size)
        return Request(
            model=embedded.TARGET if self.model is None else self.model,
            revision=self.revision,
            draft=draft,
            draft_revision=draft_revision(self.draft_revision, speculation),
            prompt=prompts[0].text,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            bad_words=bad_words,
            speculation=speculation,
            backend=self.backend.value,
            device=device,
            dtype=dtype_named(self.dtype.value, device),
            kv_cache_dtype=self.kv_cache_dtype.value,
            quantize=None if self.quantize is None else self.quantize.value,
            quantize_linears=self.quantize_linears,
            check=self.check,
            count_experts=self.count_experts,
            images=(*prompts[0].images, *(self.image or ())),
            chat=self.chat,
            lazy_vision=self.lazy_vision,
            prompts=prompts if self._is_batch(prompts) else (),
            max_batch_size=self.max_batch_size,
            memory_fraction=fraction,
            cuda_graphs=self.cuda_graphs,
            tensor_parallel_size=self.tensor_parallel_size,
            expert_parallel=self.expert_parallel,
        )

    def _sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=secrets.randbelow(2**63) if self.seed is None else self.seed,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_logit_bias(self.logit_bias),
            min_tokens=self.min_tokens,
            stop=self.stop or (),
            stop_token_ids=self.stop_token_id or (),
        )

    def _draft(self, speculation: SpeculativeConfig) -> str | Path | None:
        if self.draft and speculation.model:
            raise ValueError("--draft and the speculative config's 'model' name two drafts")
        draft = self.draft or speculation.model or (embedded.DRAFT if self.model is None else None)
        if self.speculative_config is not None and draft is None:
            raise ValueError("--speculative-config: no draft; give --draft or its key 'model'")
        return None if self.no_draft else draft

    def _prompts(self) -> tuple[Asked, ...]:
        if (self.prompt is None) == (self.prompt_file is None):
            raise ValueError("--prompt, --prompt-file: give exactly one of them")
        if self.lines and self.prompt_file is None:
            raise ValueError("--lines: needs --prompt-file")
        text = self.prompt if self.prompt_file is None else _read(self.prompt_file)
        is_file = self.prompt_file is not None
        prompts = _entries(text or "", self.lines) if is_file else (Asked(text or ""),)
        if not prompts or not all(asked.text for asked in prompts):
            raise ValueError("the prompt is empty; give at least one character")
        try:
            "".join(asked.text for asked in prompts).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--prompt: is not valid Unicode text ({error})") from error
        return prompts

    def _is_batch(self, prompts: tuple[Asked, ...]) -> bool:
        """Whether the output is a list, be it of one. Raises ValueError for what is of one text."""
        is_batch = self.lines or len(prompts) > 1
        for name, value in (("image", self.image), ("count-experts", self.count_experts)):
            if is_batch and value:
                raise ValueError(f"--{name}: goes with one prompt, got {len(prompts)}")
        return is_batch


def _entries(text: str, lines: bool) -> tuple[Asked, ...]:
    """The prompts of a file: its lines, the entries of a JSON list, or all of it."""
    if lines:
        return tuple(Asked(line) for line in text.splitlines() if line)
    if not text.startswith("["):
        return (Asked(text),)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return (Asked(text),)  # a text that begins like a list
    if not isinstance(values, list) or not all(_is_entry(value) for value in values):
        return (Asked(text),)
    return tuple(Asked(v) if isinstance(v, str) else _with_images(v) for v in values)


def _is_entry(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "prompt" in value)


def _with_images(entry: dict[str, Any]) -> Asked:
    prompt, images = entry.get("prompt"), entry.get("images", [])
    if (
        isinstance(prompt, str)
        and isinstance(images, list)
        and entry.keys() <= {"prompt", "images"}
    ):
        files = [Path(image) for image in images if isinstance(image, str)]
        if len(files) == len(images):
            return Asked(prompt, tuple(files))
    raise ValueError(
        f'--prompt-file: an entry is a text or {{"prompt": text, "images": [files]}}, '
        f"got {json.dumps(entry):.200}"
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file: cannot read {file} ({error})") from error


def _logit_bias(text: str | None) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in json.loads(text or "{}").items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'--logit-bias: must be JSON like {{"17": -5}}, got {text!r}') from error
