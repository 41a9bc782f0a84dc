"""Acceptance of the finished files, measured by the package's own loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from aerie.assets.build.training import DEPTH
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.llama4.model import Llama4ForCausalLM

NEW_TOKENS = 128


@dataclass(frozen=True)
class Acceptance:
    """Share of all drafts that had at least 1, 2, ... tokens accepted, and the written texts."""

    shares: list[float]
    texts: list[str]

    @property
    def length(self) -> float:
        """Tokens per verified draft, the bonus token included."""
        return 1 + sum(self.shares)

    def __str__(self) -> str:
        shares = " ".join(f"{share:.3f}" for share in self.shares)
        return f"acceptance length {self.length:.3f}, by position {shares}"


def measure(folder: Path, prompts: Sequence[str]) -> Acceptance:
    """Decode the prompts greedily with the pair under `folder`."""
    target = Llama4ForCausalLM.from_pretrained(folder / "target")
    draft = Eagle3Llama4ForCausalLM.from_pretrained(folder / "draft", target)
    tokenizer = Tokenizer.from_file(str(folder / "target" / "tokenizer.json"))
    runs = [generate(target, tokenizer.encode(p).ids, NEW_TOKENS, draft, DEPTH) for p in prompts]
    drafts = sum(run.stats.num_drafts for run in runs)
    accepted = [sum(run.stats.accepted_at[i] for run in runs) for i in range(DEPTH)]
    texts = [tokenizer.decode(run.tokens) for run in runs]
    return Acceptance([count / drafts for count in accepted], texts)
