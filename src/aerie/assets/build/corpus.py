"""The training text: a frozen copy of CPython's help topics, and the topics held out of it.

The copy is frozen because the text changes between Python versions; `freeze` made it once.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenizers import Tokenizer

CORPUS_PATH = Path(__file__).resolve().parent.parent / "corpus.txt"
MARKER = "=== topic: {name} ==="
_MARKER_LINE = re.compile(r"^=== topic: (\S+) ===\n", re.MULTILINE)

NUM_HELD_OUT = 6
HELD_OUT_SEED = 0
HELD_OUT_CHARS = range(800, 3000)
# The demo continues "The with statement", so its topic must be learned.
NEVER_HELD_OUT = frozenset({"with"})
# Short lines (headings, brackets) recur everywhere and say nothing about copied text.
MIN_TELLING_LINE = 25

PROMPT_TOKENS = range(24, 61)
NUM_PROMPTS = 32


@dataclass(frozen=True)
class Split:
    """Topic texts by name, those to train on and those kept apart."""

    train: dict[str, str]
    held_out: dict[str, str]


def freeze(path: Path = CORPUS_PATH) -> None:
    """Write the running Python's help topics, in sorted order, to `path`."""
    from pydoc_data.topics import topics

    path.write_text(join_topics(topics), encoding="utf-8")


def join_topics(topics: "Mapping[str, str]") -> str:
    """One text out of many; `split_topics` is the exact inverse."""
    return "".join(f"{MARKER.format(name=name)}\n{text}\n" for name, text in sorted(topics.items()))


def split_topics(corpus: str) -> dict[str, str]:
    """The topics of a joined text by name."""
    _, *parts = _MARKER_LINE.split(corpus)
    return {name: text[:-1] for name, text in zip(parts[::2], parts[1::2], strict=True)}


def load_split(path: Path = CORPUS_PATH) -> Split:
    """Read the frozen corpus and set the held-out topics apart."""
    topics = split_topics(path.read_text(encoding="utf-8"))
    held_out = choose_held_out(topics)
    train = {name: text for name, text in topics.items() if name not in held_out}
    return Split(train, {name: topics[name] for name in held_out})


def choose_held_out(topics: "Mapping[str, str]") -> list[str]:
    """A seeded draw among middle-sized topics none of whose lines occurs in another topic."""
    eligible = [
        name
        for name in sorted(topics)
        if name not in NEVER_HELD_OUT
        and len(topics[name]) in HELD_OUT_CHARS
        and not _shares_lines(name, topics)
    ]
    return sorted(random.Random(HELD_OUT_SEED).sample(eligible, NUM_HELD_OUT))


def _shares_lines(name: str, topics: "Mapping[str, str]") -> bool:
    own = _telling_lines(topics[name])
    return any(own & _telling_lines(text) for other, text in topics.items() if other != name)


def _telling_lines(text: str) -> set[str]:
    return {s for line in text.splitlines() if len(s := line.strip()) > MIN_TELLING_LINE}


def cut_prompts(held_out: "Mapping[str, str]", tokenizer: "Tokenizer") -> list[dict[str, str]]:
    """Seeded prompts from every held-out topic in turn, cut at word borders."""
    rng = random.Random(HELD_OUT_SEED)
    names = sorted(held_out)
    prompts: list[dict[str, str]] = []
    while len(prompts) < NUM_PROMPTS:
        name = names[len(prompts) % len(names)]
        text = _cut(held_out[name], rng.choice(PROMPT_TOKENS), rng, tokenizer)
        if text and all(text != prompt["text"] for prompt in prompts):
            prompts.append({"topic": name, "text": text})
    return prompts


def _cut(text: str, length: int, rng: random.Random, tokenizer: "Tokenizer") -> str | None:
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    first = rng.choice(starts)
    ends = [match.end() for match in re.finditer(r"\S+", text) if match.end() > first]
    best = None
    for end in ends:
        num_tokens = len(tokenizer.encode(text[first:end], add_special_tokens=False).ids)
        if num_tokens > length:
            break
        best = text[first:end] if num_tokens in PROMPT_TOKENS else None
    return best


if __name__ == "__main__":
    freeze()
