"""The picture of `aerie generate --plot`: acceptance by position, and the time of every round.

matplotlib draws it and is an extra, `pip install 'aerie[plot]'`; nothing else needs it.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from aerie.eagle3.stats import Stats

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
    numbers, bottom = range(1, len(stats.rounds) + 1), [0.0] * len(stats.rounds)
    for name in ("draft_ms", "verify_ms", "other_ms"):
        heights = [getattr(one, name) for one in stats.rounds]
        axes.bar(numbers, heights, bottom=bottom, width=1.0, label=name.removesuffix("_ms"))
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    tokens = [one.num_accepted + 1 for one in stats.rounds]
    axes.set(xlabel="round", ylabel="ms (host clock)")
    other = axes.twinx()
    other.plot(numbers, tokens, "k.", markersize=4)
    other.set(ylabel="tokens of the round (dots)", ylim=(0, max([2, *tokens]) * 1.3))
    axes.legend(loc="upper right")
