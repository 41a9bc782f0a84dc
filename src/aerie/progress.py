"""A bar on stderr while weights are read; nothing where stderr is no terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

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
