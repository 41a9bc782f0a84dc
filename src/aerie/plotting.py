"""The picture of `aerie generate --plot`: acceptance by position, and the time of every round; of a
batch also how many of its sequences ran in each.

matplotlib draws it and is an extra, `pip install 'aerie[plot]'`; nothing else needs it.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aerie.eagle3.stats import BatchRound, Round, Stats

SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raises ValueError where no picture could be written to `path`, before anything is decoded."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot: must end in one of {', '.join(SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot: {path.parent} is no folder")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib; pip install 'aerie[plot]'")


def draw(stats: Stats, path: Path) -> None:
    """Writes the picture of one generation."""
    figure = import_module("matplotlib.figure").Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _acceptance(left, stats)
    _rounds(right, stats)
    figure.savefig(path, dpi=150)


def draw_batch(stats: Sequence[Stats], rounds: Sequence[BatchRound], path: Path) -> None:
    """Writes the picture of a batch: acceptance of its sequences together, rounds they shared."""
    figure = import_module("matplotlib.figure").Figure(figsize=(15, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _acceptance(left, Stats.of_all(stats))
    _stack(middle, rounds, ("prefill_ms", "draft_ms", "verify_ms", "other_ms"))
    middle.legend(loc="upper right")
    running = [one.num_running for one in rounds]
    right.step(range(1, len(running) + 1), running, where="mid")
    right.set(xlabel="round", ylabel="sequences in flight", ylim=(0, max([1, *running]) * 1.1))
    right.set_title(f"{len(stats)} sequences, {sum(one.num_tokens for one in stats)} tokens")
    figure.savefig(path, dpi=150)


def _acceptance(axes: Any, stats: Stats) -> None:
    positions = range(1, len(stats.acceptance_per_position) + 1)
    axes.bar(positions, stats.acceptance_per_position, color="C0", label="accepted")
    conditional = stats.conditional_acceptance_per_position
    axes.plot(positions, conditional, "o-", color="C1", label="given the one before")
    axes.set(xlabel="position in the draft", ylabel="share of drafts", ylim=(0, 1.02))
    axes.set_xticks(list(positions))
    length = f"acceptance length {stats.acceptance_length:.2f}, bonus included"
    axes.set_title(f"{stats.num_drafts} drafts, {length}")
    axes.legend()


def _rounds(axes: Any, stats: Stats) -> None:
    _stack(axes, stats.rounds, ("draft_ms", "verify_ms", "other_ms"))
    numbers = range(1, len(stats.rounds) + 1)
    tokens = [one.num_accepted + 1 for one in stats.rounds]
    other = axes.twinx()
    other.plot(numbers, tokens, "k.", markersize=4)
    other.set(ylabel="tokens of the round (dots)", ylim=(0, max([2, *tokens]) * 1.3))
    axes.legend(loc="upper right")


def _stack(axes: Any, rounds: Sequence[Round | BatchRound], parts: Sequence[str]) -> None:
    """A bar for every round, of the times named."""
    numbers, bottom = range(1, len(rounds) + 1), [0.0] * len(rounds)
    for name in parts:
        heights = [getattr(one, name) for one in rounds]
        axes.bar(numbers, heights, bottom=bottom, width=1.0, label=name.removesuffix("_ms"))
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="round", ylabel="ms (host clock)")
