"""`aerie probe`: the texts it lets the target write, and how its diagnosis is shown."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from tokenizers import Tokenizer

from aerie import embedded
from aerie.eagle3.probe import Diagnosis, Trial
from aerie.eagle3.stats import DEAD_BELOW

MAX_PROMPT_TOKENS = 256
EMBEDDED_PROMPTS = 12
PROMPTS = (  # for any target; a chat model gets each as a user's turn
    "Explain to a new colleague how a hash table works and when it is a poor choice.",
    "Write a Python function that merges two sorted lists, with a docstring and three tests.",
    "Summarise the causes of the First World War in five sentences.",
    "A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive? Show each step.",
    "Give a recipe for lentil soup with quantities for four people.",
    "List the differences between TCP and UDP as a table.",
    "Translate into French: The committee will publish its report before the end of the month.",
    "Write the first paragraph of a story that is set on a lighthouse island in winter.",
)
TURN = (  # Llama 4's chat format
    "<|begin_of_text|><|header_start|>user<|header_end|>\n\n{}<|eot|>"
    "<|header_start|>assistant<|header_end|>\n\n"
)


def probe_prompts(file: Path | None, is_embedded: bool, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the prompts: the file's, the embedded pair's held-out ones, or `PROMPTS`."""
    if file is not None:
        texts = _read_prompts(file)
    elif is_embedded:
        held_out = json.loads(embedded.HELDOUT_PROMPTS.read_text())["prompts"]
        texts = [prompt["text"] for prompt in held_out[:EMBEDDED_PROMPTS]]
    else:
        is_chat = tokenizer.token_to_id("<|header_start|>") is not None
        texts = [TURN.format(text) if is_chat else text for text in PROMPTS]
    ids = [tokenizer.encode(t, add_special_tokens=not t.startswith("<|begin")).ids for t in texts]
    return [prompt[:MAX_PROMPT_TOKENS] for prompt in ids if prompt]


def _read_prompts(file: Path) -> list[str]:
    """A JSON list of texts, or one text."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file: cannot read {file} ({error})") from error
    if not text.lstrip().startswith("["):
        return [text]
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--prompt-file: {file} is not valid JSON ({error})") from error
    if not all(isinstance(item, str) for item in texts):
        raise ValueError(f"--prompt-file: {file} must be one text or a JSON list of texts")
    return texts


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """The object `--json` prints; gains in nats per token."""
    return {
        "verdict": diagnosis.verdict,
        "written": _trial(diagnosis.written),
        "readings": [_trial(trial) for trial in diagnosis.trials],
        "better": [trial.candidate.reading.as_dict() for trial in diagnosis.better],
        "not_told_apart": [trial.candidate.mistake for trial in diagnosis.not_told_apart],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    measured = trial.measured
    shown: dict[str, Any] = {
        "mistake": trial.candidate.mistake,
        "override": trial.candidate.reading.as_dict(),
        "refused": trial.refusal,
    }
    if measured is not None:
        shown["starts"] = len(measured.hits_NP)
        shown["acceptance_per_position"] = measured.acceptance
        shown["conditional_acceptance_per_position"] = measured.conditional_acceptance
        shown["log_prob"] = measured.log_prob
    if trial.gain is not None:
        shown |= {"gain": trial.gain, "standard_errors": trial.certainty}
    return shown


def as_table(diagnosis: Diagnosis) -> Table:
    """One line per reading: what would be the mistake, and what correcting it brings."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("if the mistake were", "first accepted", "gain in nats", "standard errors"):
        is_name = column.startswith("if")
        table.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for trial in (diagnosis.written, *diagnosis.trials):
        measured, gain = trial.measured, trial.gain
        table.add_row(
            trial.candidate.mistake if trial is not diagnosis.written else "none: as written",
            "refused" if measured is None else f"{measured.acceptance[0]:.0%}",
            "" if gain is None else f"{gain:+.3f}",
            "" if trial.certainty is None else f"{trial.certainty:+.1f}",
        )
    return table


def verdict_lines(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis in sentences, and the override to use."""
    written, lines = diagnosis.written.measured, [f"verdict: {diagnosis.verdict}"]
    if written is None:
        lines.append(f"the draft does not load as written: {diagnosis.written.refusal}")
    else:
        lines.append(
            f"accepted at position {_percentages(written.acceptance)} of {len(written.hits_NP)} "
            f"starts, length {written.acceptance_length:.2f}; dead is below {DEAD_BELOW:.0%} at 1"
        )
    if diagnosis.better:
        best = diagnosis.better[0]
        override = json.dumps(best.candidate.reading.as_dict())
        lines.append(f"most likely fault: {best.candidate.mistake}")
        lines.append(f"use --speculative-config '{override}'")
    elif diagnosis.verdict == "dead":
        lines.append("no single known mistake explains it: another target, tokenizer or template?")
    if diagnosis.not_told_apart:
        names = ", ".join(trial.candidate.mistake for trial in diagnosis.not_told_apart)
        lines.append(f"not told apart from the file's own reading by these texts: {names}")
    return lines


def _percentages(shares: list[float]) -> str:
    return ", ".join(f"{i}: {share:.0%}" for i, share in enumerate(shares, 1))
