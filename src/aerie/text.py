"""Text in, text out: the checkpoint's tokenizer, and printing tokens while they come."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from aerie.llama4.json_fields import CheckpointError

INCOMPLETE = "\ufffd"  # a byte-level token may end inside a character


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's `tokenizer.json`. Raises CheckpointError."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; it is needed to read a text prompt")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception on malformed files
        raise CheckpointError(f"{file}: not a readable tokenizer ({error})") from error


class TextStream:
    """Turns bursts of tokens into the text they add, up to the first of the `stop` strings.

    Incomplete characters, and what may turn out to be the beginning of a stop string, wait.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.tokens: list[int] = []
        self._printed = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The new text; "" while a character is incomplete."""
        self.tokens += tokens
        text = self.text
        if text.endswith(INCOMPLETE):
            return ""
        return self._new(text[: len(text) - self._held_back(text)])

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        return self._new(self.text)

    @property
    def text(self) -> str:
        text = self.tokenizer.decode(self.tokens)
        return text[: min([text.find(stop) for stop in self.stop if stop in text], default=None)]

    def _new(self, text: str) -> str:
        new, self._printed = text[self._printed :], max(self._printed, len(text))
        return new

    def _held_back(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string may begin with."""
        beginnings = (stop[:n] for stop in self.stop for n in range(1, len(stop)))
        return max((len(start) for start in beginnings if text.endswith(start)), default=0)
