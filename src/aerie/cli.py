"""The command line: `aerie generate`, `convert`, `probe`, `inspect` and `doctor`.

Text and tables go to stdout, everything else to stderr; `--json` prints one object on stdout and
nothing else there. Exit codes: 0 fine, 1 `--check` found different ids or `probe` a draft that is
not read rightly and alive, 2 bad input (for `inspect`: a checkpoint with problems).
"""

import io
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from aerie import embedded, inspection, probing, report
from aerie.doctor import diagnose
from aerie.eagle3.probe import probe as probe_draft
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.llama4.checkpoint import resolve_folder
from aerie.llama4.convert import convert as convert_checkpoint
from aerie.run import Request, device_named, dtype_named, load, load_target, run
from aerie.text import load_tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
stdout, stderr = Console(highlight=False), Console(stderr=True, highlight=False)


class BackendName(StrEnum):
    auto = "auto"
    triton = "triton"
    eager = "eager"


class DtypeName(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class KVCacheDtypeName(StrEnum):
    auto = "auto"
    fp8 = "fp8"


class FP8Name(StrEnum):
    fp8 = "fp8"


class QuantizeName(StrEnum):
    fp8 = "fp8"
    fp8_block = "fp8_block"


def main() -> None:
    """Console entry point."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    app()


@app.callback()
def _commands() -> None:
    """EAGLE-3 speculative decoding for Llama 4 on hand-written Triton kernels."""


@app.command()
def generate(
    model: Annotated[
        str | None, typer.Option(help="Target: folder or hub id. Default: the embedded pair.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Eagle3 draft: folder or hub id.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    speculative_config: Annotated[
        str | None,
        typer.Option(help='JSON, e.g. {"method": "eagle3", "num_speculative_tokens": 4}'),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest; 0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest of this mass.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Keep what is this likely next to the best.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Repeats a sampled run. Default: any.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Of prompt and output; 1: off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Of output; 0: off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Of output, per use; 0: off.")] = 0.0,
    min_tokens: Annotated[int, typer.Option(help="No end before this many tokens.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End at this token; may be repeated.")
    ] = None,
    bad_word: Annotated[
        list[str] | None, typer.Option(help="Never write this text's tokens; may be repeated.")
    ] = None,
    logit_bias: Annotated[
        str | None, typer.Option(help='Added to logits: JSON, e.g. {"17": -5}')
    ] = None,
    no_draft: Annotated[bool, typer.Option("--no-draft", help="Plain decoding.")] = False,
    backend: Annotated[BackendName, typer.Option()] = BackendName.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if any.")] = "auto",
    dtype: Annotated[
        DtypeName, typer.Option(help="auto: bfloat16 on a GPU, else float32.")
    ] = DtypeName.auto,
    kv_cache_dtype: Annotated[
        KVCacheDtypeName, typer.Option(help="Of the keys and values. auto: the dtype.")
    ] = KVCacheDtypeName.auto,
    quantize: Annotated[
        QuantizeName | None,
        typer.Option(help="Make the target's experts FP8 while they are read."),
    ] = None,
    quantize_linears: Annotated[
        bool, typer.Option("--quantize-linears", help="The other projections too.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Also decode without the draft and compare the ids.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Decode a prompt speculatively, and show what the draft was worth."""
    with _exit_code_2_on_bad_input():
        sampling = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=secrets.randbelow(2**63) if seed is None else seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=_logit_bias(logit_bias),
            min_tokens=min_tokens,
            stop=stop or (),
            stop_token_ids=stop_token_id or (),
        )
        request = Request.build(
            model=model,
            draft=draft,
            prompt=_prompt(prompt, prompt_file),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            bad_words=tuple(bad_word or ()),
            speculative_config=speculative_config,
            no_draft=no_draft,
            backend=backend.value,
            device=device,
            dtype=dtype.value,
            kv_cache_dtype=kv_cache_dtype.value,
            quantize=None if quantize is None else quantize.value,
            quantize_linears=quantize_linears,
            check=check,
        )
        loaded = load(request)
        if loaded.draft is None and not no_draft:
            stderr.print("No draft given (--draft): plain decoding.")
        outcome = run(request, loaded, on_text=None if as_json else _print_now)
    if as_json:
        print(json.dumps(report.as_dict(outcome)))
    else:
        stdout.print()
        stdout.print(report.as_table(outcome))
    if outcome.identical is False:
        stderr.print(report.first_difference(outcome))
        raise typer.Exit(1)


@app.command()
def probe(
    model: Annotated[
        str | None, typer.Option(help="Target: folder or hub id. Default: the embedded pair.")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Eagle3 draft: folder or hub id.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="One text, or a JSON list of texts.")
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens the target writes per prompt.")] = 48,
    speculative_config: Annotated[
        str, typer.Option(help="JSON; its overrides count as what the files say.")
    ] = "{}",
    backend: Annotated[BackendName, typer.Option()] = BackendName.auto,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if any.")] = "auto",
    dtype: Annotated[
        DtypeName, typer.Option(help="auto: bfloat16 on a GPU, else float32.")
    ] = DtypeName.auto,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Is a draft alive, and if it accepts little: which known mistake explains it?"""
    with _exit_code_2_on_bad_input():
        if model is not None and draft is None:
            raise ValueError("--draft: name the draft to probe")
        speculation = SpeculativeConfig.from_json(speculative_config)
        folder = resolve_folder(embedded.TARGET if model is None else model)
        where = device_named(device)
        target = load_target(folder, where, dtype_named(dtype.value, where), backend.value)
        prompts = probing.probe_prompts(prompt_file, model is None, load_tokenizer(folder))
        path = embedded.DRAFT if draft is None else draft
        diagnosis = probe_draft(path, target, prompts, num_tokens, speculation.reading)
    if as_json:
        print(json.dumps(probing.as_dict(diagnosis)))
    else:
        stdout.print(probing.as_table(diagnosis))
        for line in probing.verdict_lines(diagnosis):
            stdout.print(line, markup=False, soft_wrap=True)
    if diagnosis.verdict != "alive":
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="A target or a draft: folder or hub id.")],
    target: Annotated[
        str | None, typer.Option(help="The target of the draft at PATH: folder or hub id.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens per sequence to plan memory for.")] = 8192,
    batch: Annotated[int, typer.Option(help="Sequences to plan memory for.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a checkpoint is, how it would be read and why, and all that is wrong with it."""
    with _exit_code_2_on_bad_input():
        found = inspection.inspect(
            resolve_folder(path), resolve_folder(target) if target else None, context, batch
        )
    if as_json:
        print(json.dumps(inspection.as_dict(found)))
    else:
        stdout.print(report.key_value_table(inspection.as_rows(found)))
        for problem in found.problems:
            stdout.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Target: folder or hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    experts: Annotated[FP8Name, typer.Option(help="Format of the routed experts.")],
    linears: Annotated[
        FP8Name | None, typer.Option(help="Of all other projections but router and head.")
    ] = None,
    block: Annotated[
        bool, typer.Option("--block", help="Scales per 128 x 128 block, not per channel.")
    ] = False,
) -> None:
    """Write an unquantised target as a compressed-tensors FP8 checkpoint."""
    assert experts == FP8Name.fp8  # the only format so far
    with _exit_code_2_on_bad_input():
        made = convert_checkpoint(
            source, destination, "fp8_block" if block else "fp8", linears is not None
        )
    stdout.print(
        f"{made.folder}: {made.quantised} projections in FP8, {made.copied} tensors as they were, "
        f"{made.nbytes / 1e9:.3g} GB",
        markup=False,
        soft_wrap=True,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Versions, devices, and which backend `auto` means here."""
    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis))
        return
    stdout.print(report.key_value_table(diagnosis))


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("--prompt, --prompt-file: give exactly one of them")
    text = prompt if prompt_file is None else _read(prompt_file)
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"--prompt: is not valid Unicode text ({error})") from error
    return text


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


def _print_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _exit_code_2_on_bad_input() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # the reader of stdout went away; click ends quietly
        raise
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
