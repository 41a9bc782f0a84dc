"""The toy task: four coloured quarters of a picture, named in reading order.

A quarter is one image token, so every word of an answer is decided by one of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.assets.build.tokenizer import EOS_ID, PAD_ID
from aerie.assets.tiny_multimodal.checkpoint import IMAGE_TOKENS, VISION, new_tokenizer
from aerie.tiles import TileRule

QUESTION = "Colours?"
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 60, 220),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
    "yellow": (235, 220, 40),
    "orange": (240, 140, 20),
    "purple": (140, 40, 170),
}
SIDE = VISION["image_size"]
NOISE = 12  # of every pixel's channels, to both sides
ANSWER_TOKENS = 1 + 4 * len("yellow,") + 3 + 1  # the longest, with its end token


@dataclass(frozen=True)
class Rows:
    """Whole texts [B, T], padded behind the answer, and the tiles [B, 3, side, side]."""

    ids: Tensor
    pixel_values: Tensor
    prompt_length: int


def picture(names: tuple[str, ...], random: torch.Generator) -> Tensor:
    """A uint8 image [3, side, side] of four quarters."""
    half = SIDE // 2
    colours = torch.tensor([COLOURS[name] for name in names]).view(2, 2, 3)
    image = colours.permute(2, 0, 1).repeat_interleave(half, 1).repeat_interleave(half, 2)
    noise = torch.randint(-NOISE, NOISE + 1, image.shape, generator=random)
    return (image + noise).clamp(0, 255).to(torch.uint8)


def answer(names: tuple[str, ...]) -> str:
    return f" {', '.join(names)}."


def draw(count: int, random: torch.Generator) -> list[tuple[str, ...]]:
    """The quarters of `count` pictures."""
    picked = torch.randint(len(COLOURS), (count, 4), generator=random)
    names = list(COLOURS)
    return [tuple(names[i] for i in row) for row in picked.tolist()]


def prompt_ids() -> list[int]:
    """As `aerie.prompting` writes one image in front of the question."""
    start, end, image, patch = IMAGE_TOKENS[:4]
    return new_tokenizer().encode(f"{start}{image}{patch * 4}{end}{QUESTION}").ids


def rows(pictures: list[tuple[str, ...]], random: torch.Generator) -> Rows:
    tokenizer, rule, prompt = new_tokenizer(), TileRule(SIDE), prompt_ids()
    ids = torch.full((len(pictures), len(prompt) + ANSWER_TOKENS), PAD_ID)
    for row, names in zip(ids, pictures, strict=True):
        text = [*prompt, *tokenizer.encode(answer(names), add_special_tokens=False).ids, EOS_ID]
        row[: len(text)] = torch.tensor(text)
    tiles = [rule.cut(picture(names, random)).pixel_values for names in pictures]
    return Rows(ids, torch.cat(tiles).float(), len(prompt))
