"""The command line: `aerie generate`, `probe`, `inspect`, `plan`, `convert` and `doctor`.

A command is a file in `commands/`: a frozen dataclass of its options, and a function of it.
Exit codes: 0 fine, 1 `--check` found different ids or `probe` a draft that is not read rightly and
alive, 2 bad input (for `inspect`: a checkpoint with problems, for `plan`: more than fits).
"""

import io
import sys

import typer

from aerie.commands.convert import convert
from aerie.commands.doctor import doctor
from aerie.commands.generate import generate
from aerie.commands.inspect import inspect
from aerie.commands.plan import plan
from aerie.commands.probe import probe
from aerie.commands.shared import command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
for run in (generate, probe, inspect, plan, convert, doctor):
    app.command()(command(run))


def main() -> None:
    """Console entry point."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    app()


@app.callback()
def _commands() -> None:
    """EAGLE-3 speculative decoding for Llama 4 on hand-written Triton kernels."""
