"""`aerie convert`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aerie.commands.shared import RevisionOption, exit_code_2_on_bad_input, stdout
from aerie.llama4.convert import convert as convert_checkpoint


class FP8Name(StrEnum):
    fp8 = "fp8"


@dataclass(frozen=True)
class ConvertOptions:
    source: Annotated[str, typer.Argument(metavar="SRC", help="Target: folder or hub id.")]
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")]
    experts: Annotated[FP8Name, typer.Option(help="Format of the routed experts.")]
    linears: Annotated[
        FP8Name | None, typer.Option(help="Of all other projections but router and head.")
    ] = None
    block: Annotated[
        bool, typer.Option("--block", help="Scales per 128 x 128 block, not per channel.")
    ] = False
    revision: RevisionOption = None


def convert(options: ConvertOptions) -> None:
    """Write an unquantised target as a compressed-tensors FP8 checkpoint."""
    assert options.experts == FP8Name.fp8  # the only format so far
    quantize = "fp8_block" if options.block else "fp8"
    with exit_code_2_on_bad_input():
        made = convert_checkpoint(
            options.source,
            options.destination,
            quantize,
            options.linears is not None,
            options.revision,
        )
    stdout.print(
        f"{made.folder}: {made.quantised} projections in FP8, {made.copied} tensors as they were, "
        f"{made.nbytes / 1e9:.3g} GB",
        markup=False,
        soft_wrap=True,
    )
