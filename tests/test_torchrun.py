"""`aerie generate` under torchrun: two processes write one text, and end together.

Regimes: the text of one process on stdout, once; another number of processes than asked; a rank
that is killed in the middle ends the job with an error within 30 seconds.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from aerie.cli import app

SECONDS = 30  # from the death of a rank to the end of the job
COMMAND = [  # standalone: a port of its own, as these tests run beside each other
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
    "-m", "aerie", "generate", "--device", "cpu", "--tensor-parallel-size", "2",
    "--prompt", "The with statement",
]  # fmt: skip


def test_one_text_of_two_processes():
    config = '{"method": "eagle3", "num_speculative_tokens": 4, "draft_tensor_parallel_size": 1}'
    command = [*COMMAND, "--speculative-config", config, "--max-new-tokens", "12", "--json"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    options = ["--prompt", "The with statement", "--max-new-tokens", "12", "--json"]
    alone = CliRunner().invoke(app, ["generate", "--device", "cpu", *options])
    ours, expected = json.loads(shown.stdout), json.loads(alone.stdout)
    assert ours["token_ids"] == expected["token_ids"]
    assert ours["stats"]["num_target_passes"] == expected["stats"]["num_target_passes"]
    assert ours["stats"]["num_drafts"] > 0


def test_another_number_of_processes():
    result = CliRunner().invoke(
        app, ["generate", "--prompt", "A", "--device", "cpu", "--tensor-parallel-size", "2"]
    )
    assert result.exit_code == 2
    assert "--tensor-parallel-size" in result.stderr
    assert "got 2 for 1; use torchrun --nproc-per-node 2" in result.stderr


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in listed.split()]


def test_a_killed_rank_ends_the_job():
    command = [*COMMAND, "--max-new-tokens", "900"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert job.stdout is not None
    assert job.stdout.read(8)  # the text has begun
    os.kill(children(job.pid)[1], signal.SIGKILL)
    start = time.monotonic()
    job.stdout.read()
    assert job.wait(SECONDS) != 0
    assert time.monotonic() - start < SECONDS
