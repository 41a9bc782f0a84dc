"""`aerie inspect`."""

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from aerie import inspection, inspection_report
from aerie.commands.shared import JsonOption, exit_code_2_on_bad_input, stdout
from aerie.eagle3.memory_plan import CONTEXT
from aerie.llama4.hub import resolve_folder
from aerie.report import key_value_table


@dataclass(frozen=True)
class InspectOptions:
    path: Annotated[str, typer.Argument(help="A target or a draft: folder or hub id.")]
    target: Annotated[
        str | None, typer.Option(help="The target of the draft at PATH: folder or hub id.")
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the hub id at PATH.")
    ] = None
    target_revision: Annotated[str | None, typer.Option(help="That of --target.")] = None
    context: Annotated[
        int | None,
        typer.Option(help=f"Tokens of a sequence to plan memory for. Default: {CONTEXT}"),
    ] = None
    batch: Annotated[int, typer.Option(help="Sequences to plan memory for.")] = 1
    as_json: JsonOption = False


def inspect(options: InspectOptions) -> None:
    """What a checkpoint is, how it would be read and why, and all that is wrong with it."""
    with exit_code_2_on_bad_input():
        pin = options.target_revision
        target = resolve_folder(options.target, pin) if options.target else None
        folder = resolve_folder(options.path, options.revision)
        found = inspection.inspect(folder, target, options.context, options.batch)
    if options.as_json:
        print(json.dumps(inspection_report.as_dict(found)))
    else:
        stdout.print(key_value_table(inspection_report.as_rows(found)))
        for problem in found.problems:
            stdout.print(f"problem: {problem}", markup=False, soft_wrap=True)
    if found.problems:
        raise typer.Exit(2)
