"""What the commands share: options of one meaning, consoles, exit codes.

Text and tables go to stdout, everything else to stderr; `--json` prints one object on stdout and
nothing else there.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console

from aerie.eagle3.speculation import SpeculativeConfig

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


ModelOption = Annotated[
    str | None, typer.Option(help="Target: folder or hub id. Default: the embedded pair.")
]
DraftOption = Annotated[str | None, typer.Option(help="Eagle3 draft: folder or hub id.")]
RevisionOption = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the target's hub id.")
]
DraftRevisionOption = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of the draft's hub id.")
]
BackendOption = Annotated[BackendName, typer.Option()]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto: a GPU if any.")]
DtypeOption = Annotated[DtypeName, typer.Option(help="auto: bfloat16 on a GPU, else float32.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def command(run: Callable[..., None]) -> Callable[..., None]:
    """`run` as typer reads commands: a parameter for every field of its dataclass of options."""
    options = get_type_hints(run)["options"]

    def from_values(**values: Any) -> None:
        run(options(**values))

    from_values.__name__, from_values.__doc__ = run.__name__, run.__doc__
    from_values.__signature__ = inspect.signature(options)  # pyright: ignore[reportFunctionMemberAccess]
    return from_values


def draft_revision(option: str | None, speculation: SpeculativeConfig) -> str | None:
    """The pin of the draft: an option, or the speculative config's key."""
    if option is not None and speculation.revision is not None:
        raise ValueError("--draft-revision and the speculative config's 'revision' pin one draft")
    return option if option is not None else speculation.revision


@contextmanager
def exit_code_2_on_bad_input() -> Iterator[None]:
    """What a caller can cause becomes one sentence on stderr."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout went away; click ends quietly
        raise
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        stderr.quiet = False
        stderr.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
