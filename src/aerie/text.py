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
    """Turns bursts of tokens into the text they add, holding back incomplete characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self._printed = 0

    def add(self, tokens: Sequence[int]) -> str:
        """The new text; "" while a character is incomplete."""
        self.tokens += tokens
        text = self.text
        if text.endswith(INCOMPLETE):
            return ""
        new, self._printed = text[self._printed :], len(text)
        return new

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        return self.text[self._printed :]

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.tokens)
