"""Ranks on one machine: processes that share a gloo group and wait for work.

`ranks(function, *arguments)` runs `function(group, *arguments)` on all of them and returns what
each returned. They live as long as the session: starting a process costs more than most tests.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=60)  # a rank that waits in vain is an error, not a hang


class Ranks:
    """`size` processes; the functions they are given must be importable."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["aerie.eagle3.generate", "transformers"])
        self.size, self._pipes, self._processes = size, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            meeting = (rank, size, str(folder / f"store-{size}"))
            process = context.Process(target=_serve, args=(theirs, *meeting), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, work: Callable, *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((work, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        errors = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for _, result in answers]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", TIMEOUT, size, rank)
    while (task := pipe.recv()) is not None:
        work, arguments = task
        try:
            pipe.send((None, work(dist.group.WORLD, *arguments)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()
