"""What seeing images is worth to a draft: acceptance on pictures that no training saw."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from aerie.assets.build.acceptance import Acceptance
from aerie.assets.tiny_multimodal.task import answer, draw, prompt_ids, rows
from aerie.assets.tiny_multimodal.training import DEPTH
from aerie.eagle3.generate import generate
from aerie.eagle3.reading import DraftMultimodal, Reading
from aerie.eagle3.registry import load_draft
from aerie.llama4.conditional_generation import Llama4ForConditionalGeneration
from aerie.text import load_tokenizer

HELD_OUT_SEED = 1_000_003
MAX_NEW_TOKENS = 48  # the longest answer is shorter


@dataclass(frozen=True)
class Measured:
    """Acceptance over all answers, and the share of pictures that were named rightly."""

    acceptance: Acceptance
    right: float


def measure(
    target_folder: Path, draft_folder: Path, draft_multimodal: DraftMultimodal, pictures: int = 32
) -> Measured:
    """Greedy answers about pictures, with the draft shown images in one way or the other."""
    target = Llama4ForConditionalGeneration.from_pretrained(target_folder)
    draft = load_draft(draft_folder, target, reading=Reading(draft_multimodal=draft_multimodal))
    random = torch.Generator().manual_seed(HELD_OUT_SEED)
    drawn = draw(pictures, random)
    tiles, prompt = rows(drawn, random).pixel_values, prompt_ids()
    images = [target.image_features(prompt, tile[None]) for tile in tiles]
    runs = [generate(target, prompt, MAX_NEW_TOKENS, draft, DEPTH, images=i) for i in images]
    drafts = sum(run.stats.num_drafts for run in runs)
    shares = [sum(run.stats.accepted_at[i] for run in runs) / drafts for i in range(DEPTH)]
    tokenizer = load_tokenizer(target_folder)
    texts = [tokenizer.decode(run.tokens) for run in runs]
    right = [text == answer(names) for text, names in zip(texts, drawn, strict=True)]
    return Measured(Acceptance(shares, texts), sum(right) / pictures)


def table(runs: Mapping[tuple[str, str], Measured]) -> str:
    """Lines for (what the draft was trained on, what it was shown)."""
    lines = ["trained on  shown   length  accepted at 1 2 3 4   answers right"]
    for (trained, shown), measured in runs.items():
        found = measured.acceptance
        shares = " ".join(f"{share:.2f}" for share in found.shares)
        lines.append(
            f"{trained:10}  {shown:6}  {found.length:6.2f}  {shares}  {measured.right:.0%}"
        )
    return "\n".join(lines)
