"""Is a draft alive, and if it is not read as it was trained, which reading would be right?

A draft that is read wrongly loads, stays lossless and accepts less or nothing. The probe lets the
target write some text and measures the draft on it as its files say, then under one known mistake
at a time. The readings are compared by the log-probability they give to the target's tokens, start
by start: taps one layer off cost the embedded pair few of its accepted tokens, which no short run
could tell, but more than five standard errors of this measure. Two mistakes at once are not found.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aerie.eagle3.acceptance import MAX_POSITIONS, Measured, Transcript, measure, transcribe
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.misreadings import Candidate, candidates, near, other_maps
from aerie.eagle3.reading import AS_WRITTEN, Reading
from aerie.eagle3.registry import load_draft
from aerie.eagle3.stats import DEAD_BELOW
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM

COMPARED = 2  # drafted positions; norm_output shows from the second on
CERTAIN = 4.0  # standard errors
SMALLEST_GAIN = 0.01  # nats per token: nothing is worth an override below it
BLOCK = 8  # neighbouring starts share text, so errors are those of block means
LEAST_TOKENS = MAX_POSITIONS + BLOCK  # per prompt

Verdict = Literal["alive", "misread", "dead", "unreadable"]


@dataclass(frozen=True)
class Trial:
    """One reading of the draft and what it gives.

    `gain` is in nats per token over the files' own reading, `certainty` in standard errors; both
    are None where one of the two cannot be loaded. `refusal` is why this one cannot.
    """

    candidate: Candidate
    measured: Measured | None
    gain: float | None = None
    certainty: float | None = None
    refusal: str | None = None

    @property
    def is_alive(self) -> bool:
        return self.measured is not None and self.measured.acceptance[0] >= DEAD_BELOW


@dataclass(frozen=True)
class Diagnosis:
    """What the probe found. `better` are readings that beat the files' own, best first."""

    verdict: Verdict
    written: Trial
    trials: tuple[Trial, ...]
    better: tuple[Trial, ...]

    @property
    def not_told_apart(self) -> tuple[Trial, ...]:
        """Readings that fit as well as the files' own within the error of the measurement."""
        trials = (trial for trial in self.trials if trial.certainty is not None)
        return tuple(t for t in trials if t.certainty is not None and abs(t.certainty) < CERTAIN)


def probe(
    path: str | Path,
    target: Llama4ForCausalLM,
    prompts: Sequence[Sequence[int]],
    num_tokens: int = 48,
    reading: Reading = AS_WRITTEN,
) -> Diagnosis:
    """Measures the draft at `path` on the target's continuations of `prompts` (token ids).

    `reading` is the user's own, which counts as what the files say. Raises CheckpointError if no
    reading of the draft loads, ValueError for prompts the target cannot continue.
    """
    if not prompts or num_tokens < LEAST_TOKENS:
        raise ValueError(
            f"prompts, num_tokens: at least one prompt and {LEAST_TOKENS} tokens for each are "
            f"needed, got {len(prompts)} and {num_tokens}"
        )
    depth = target.config.num_hidden_layers
    layers = near(_taps_of_some_reading(path, target, reading), depth)
    texts = [transcribe(target, ids, num_tokens, layers) for ids in prompts]
    return compare(path, target, texts, reading)


def compare(
    path: str | Path,
    target: Llama4ForCausalLM,
    texts: Sequence[Transcript],
    reading: Reading = AS_WRITTEN,
) -> Diagnosis:
    """As `probe`, on transcripts that exist already."""
    draft, refusal = _load(path, target, reading)
    as_written = Candidate("as written", reading)
    if draft is None:
        trials = [_trial(c, path, target, texts, None) for c in other_maps(reading)]
        return diagnose(Trial(as_written, None, refusal=refusal), trials)
    written = measure(draft, draft.tap_layers(target), texts, MAX_POSITIONS)
    known = list(candidates(draft, target))
    del draft
    trials = [_trial(candidate, path, target, texts, written) for candidate in known]
    return diagnose(Trial(as_written, written), trials)


def diagnose(written: Trial, trials: Sequence[Trial]) -> Diagnosis:
    """The verdict over measurements."""
    better = [trial for trial in trials if _is_better(trial, written)]
    better.sort(key=lambda trial: -(trial.gain or 0.0))
    verdict: Verdict = "alive" if written.is_alive else "dead"
    if written.measured is None:
        verdict = "unreadable"
    elif better:
        verdict = "misread"
    return Diagnosis(verdict, written, tuple(trials), tuple(better))


def _taps_of_some_reading(
    path: str | Path, target: Llama4ForCausalLM, reading: Reading
) -> tuple[int, ...]:
    refusals = []
    for candidate in (Candidate("as written", reading), *other_maps(reading)):
        draft, refusal = _load(path, target, candidate.reading)
        if draft is not None:
            return draft.tap_layers(target)
        refusals.append(refusal)
    raise CheckpointError(refusals[0])


def _load(
    path: str | Path, target: Llama4ForCausalLM, reading: Reading
) -> tuple[Eagle3Llama4ForCausalLM | None, str]:
    try:
        return load_draft(path, target, reading=reading), ""
    except CheckpointError as error:
        return None, str(error)


def _trial(
    candidate: Candidate,
    path: str | Path,
    target: Llama4ForCausalLM,
    texts: Sequence[Transcript],
    written: Measured | None,
) -> Trial:
    draft, refusal = _load(path, target, candidate.reading)
    if draft is None:
        return Trial(candidate, None, refusal=refusal)
    measured = measure(draft, draft.tap_layers(target), texts, COMPARED)
    if written is None:
        return Trial(candidate, measured)
    gain_N = (measured.log_probs_NP - written.log_probs_NP[:, :COMPARED]).mean(1)
    return Trial(candidate, measured, float(gain_N.mean()), _standard_errors(gain_N))


def _standard_errors(gain_N: Tensor) -> float:
    """How many of them the mean is away from zero."""
    blocks = torch.stack([block.mean() for block in gain_N.split(BLOCK)])
    if len(blocks) < 2 or not blocks.any():
        return 0.0
    return float(gain_N.mean() / (blocks.std() / len(blocks) ** 0.5))


def _is_better(trial: Trial, written: Trial) -> bool:
    """A reading that leaves a dead draft dead corrects nothing, whatever it gains."""
    if written.measured is None or not trial.is_alive:
        return trial.is_alive
    if trial.gain is None or trial.certainty is None:
        return False
    return trial.gain > SMALLEST_GAIN and trial.certainty > CERTAIN
