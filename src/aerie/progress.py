"""Bars on stderr while weights or a long prompt are read and while a batch is decoded; nothing
where it is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from aerie.eagle3.engine import PREFILL_ROWS
from aerie.llama4 import checkpoint


@contextmanager
def loading(what: str, console: Console) -> Iterator[checkpoint.Progress | None]:
    """Gives what a loader tells of bytes read and bytes in all; None where nobody would see it."""
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn(f"loading {what}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def reading_prompt(num_tokens: int, console: Console) -> Iterator[Callable[[int], None] | None]:
    """Gives what is told how many tokens have been read; None where one pass reads them all."""
    if not console.is_terminal or num_tokens <= PREFILL_ROWS:
        yield None
        return
    columns = TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("prompt", total=num_tokens)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def decoding(num_prompts: int, console: Console) -> Iterator[Callable[[int, int], None] | None]:
    """Gives what is told how many prompts of a batch have ended and how many tokens there are."""
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("decoding"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("batch", total=num_prompts, tokens=0)
        yield lambda ended, tokens: bar.update(task, completed=ended, tokens=tokens)
