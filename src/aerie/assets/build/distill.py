"""The draft's training text: what the target itself writes, greedily, after many prompts."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from aerie.assets.build.model import Llama4
from aerie.assets.build.tokenizer import BOS_ID, EOS_ID


@dataclass(frozen=True)
class Distillation:
    """Amount and kind of continuations in the shipped run."""

    batches: int = 8
    rows: int = 128
    row_length: int = 256
    shortest_prompt: int = 4
    longest_prompt: int = 96
    # Served prompts are not training text: disturb some, so that the draft sees what follows.
    disturbed: float = 0.4


class PromptCutter:
    """Prompts cut from the topics at word starts, some of them disturbed."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        self.texts, self.tokenizer = texts, tokenizer
        self.sizes = [len(text) for text in texts]
        self.rng = random.Random(seed)

    def prompts(self, num_rows: int, length: int, disturbed: float) -> torch.Tensor:
        """[num_rows, length] ids, bos first."""
        rows = []
        while len(rows) < num_rows:
            text = self._snippet(length)
            if self.rng.random() < disturbed:
                text = self._disturb(text, length)
            ids = self.tokenizer.encode(text).ids
            if len(ids) >= length:
                rows.append(ids[:length])
        return torch.tensor(rows)

    def _snippet(self, length: int) -> str:
        (text,) = self.rng.choices(self.texts, self.sizes)
        start = self.rng.randrange(len(text))
        # A token is rarely longer than eight characters, so this is enough text.
        tail = text[start : start + 8 * length + 40]
        _, _, from_word = tail.partition(" ")
        return from_word.lstrip()

    def _disturb(self, text: str, length: int) -> str:
        words = text.split(" ")
        kind = self.rng.randrange(3)
        if kind == 0:
            return " ".join(word for word in words if self.rng.random() > 0.15)
        if kind == 1:
            cut = self.rng.randrange(1, max(2, min(len(words), length // 2)))
            return " ".join(words[:cut]) + " " + self._snippet(length)
        other = self._snippet(length).split(" ")
        return " ".join(self.rng.choice(other) if self.rng.random() < 0.15 else w for w in words)


def blank_after_end(ids_BT: torch.Tensor) -> torch.Tensor:
    """Replace what follows the first eos by bos, which the draft's loss leaves out."""
    ended_BT = (ids_BT == EOS_ID).cumsum(1) - (ids_BT == EOS_ID).long() > 0
    return ids_BT.masked_fill(ended_BT, BOS_ID)


def distill(model: Llama4, texts: Sequence[str], tokenizer: Tokenizer, seed: int) -> torch.Tensor:
    """[batches * rows, row_length] token ids on the CPU."""
    plan = Distillation()
    parts = []
    for batch in range(plan.batches):
        cutter = PromptCutter(texts, tokenizer, seed * plan.batches + batch)
        parts.append(distill_batch(model, cutter, plan))
        print(f"distill batch {batch + 1} of {plan.batches}", file=sys.stderr, flush=True)
    return torch.cat(parts)


def distill_batch(model: Llama4, cutter: PromptCutter, plan: Distillation) -> torch.Tensor:
    """[rows, row_length]: continuations of prompts of one length."""
    length = cutter.rng.randint(plan.shortest_prompt, plan.longest_prompt)
    prompt_BT = cutter.prompts(plan.rows, length, plan.disturbed).to(model.device)
    return blank_after_end(model.greedy(prompt_BT, plan.row_length)).cpu()
