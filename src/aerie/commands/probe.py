"""`aerie probe`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from aerie import embedded, probing
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
    exit_code_2_on_bad_input,
    stderr,
    stdout,
)
from aerie.eagle3.probe import Diagnosis
from aerie.eagle3.probe import probe as probe_draft
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.llama4.hub import resolve_folder
from aerie.loading import load_target
from aerie.progress import loading
from aerie.request import device_named, dtype_named
from aerie.text import load_tokenizer


@dataclass(frozen=True)
class ProbeOptions:
    model: ModelOption = None
    draft: DraftOption = None
    prompt_file: Annotated[Path | None, typer.Option(help="One text, or a JSON list of texts.")] = (
        None
    )
    revision: RevisionOption = None
    draft_revision: DraftRevisionOption = None
    num_tokens: Annotated[int, typer.Option(help="Tokens the target writes per prompt.")] = 48
    speculative_config: Annotated[
        str, typer.Option(help="JSON; its overrides count as what the files say.")
    ] = "{}"
    backend: BackendOption = BackendName.auto
    device: DeviceOption = "auto"
    dtype: DtypeOption = DtypeName.auto
    as_json: JsonOption = False


def probe(options: ProbeOptions) -> None:
    """Is a draft alive, and if it accepts little: which known mistake explains it?"""
    with exit_code_2_on_bad_input():
        diagnosis = _diagnosis(options)
    if options.as_json:
        print(json.dumps(probing.as_dict(diagnosis)))
    else:
        stdout.print(probing.as_table(diagnosis))
        for line in probing.verdict_lines(diagnosis):
            stdout.print(line, markup=False, soft_wrap=True)
    if diagnosis.verdict != "alive":
        raise typer.Exit(1)


def _diagnosis(options: ProbeOptions) -> Diagnosis:
    if options.model is not None and options.draft is None:
        raise ValueError("--draft: name the draft to probe")
    speculation = SpeculativeConfig.from_json(options.speculative_config)
    model = embedded.TARGET if options.model is None else options.model
    folder = resolve_folder(model, options.revision)
    pin = draft_revision(options.draft_revision, speculation)
    draft = resolve_folder(embedded.DRAFT if options.draft is None else options.draft, pin)
    device = device_named(options.device)
    dtype = dtype_named(options.dtype.value, device)
    with loading("target", stderr) as progress:
        target = load_target(
            folder, device, dtype, options.backend.value, progress=progress, lazy_vision=True
        ).get_language_model()
    tokenizer = load_tokenizer(folder)
    prompts = probing.probe_prompts(options.prompt_file, options.model is None, tokenizer)
    return probe_draft(draft, target, prompts, options.num_tokens, speculation.reading)
