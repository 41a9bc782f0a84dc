"""Builds a tiny multimodal pair that names the colours of a picture: a minute of one core.

OUT/target and OUT/draft are checkpoints in the real formats, OUT/*.png pictures to ask about. With
--compare two drafts are trained alike, one on image features and one on the placeholders' text
embeddings, and what each accepts on unseen pictures is printed.
"""

import argparse
from pathlib import Path

import torch

from aerie.assets.build.checkpoint import save_draft
from aerie.assets.tiny_multimodal.checkpoint import save
from aerie.assets.tiny_multimodal.comparison import measure, table
from aerie.assets.tiny_multimodal.task import SIDE, picture
from aerie.assets.tiny_multimodal.training import INPUTS, train_draft, train_target

PICTURES = (("red", "blue", "white", "green"), ("yellow", "yellow", "black", "purple"))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m aerie.assets.tiny_multimodal", description=__doc__
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # small gradients are slow on a CPU otherwise
    out = options.out
    model = train_target(options.seed)
    save(model, out / "target")
    save_draft(train_draft(model, "merged", options.seed), out / "draft")
    _save_pictures(out)
    if options.compare:
        save_draft(train_draft(model, "text", options.seed), out / "draft-text")
        folders = {"merged": out / "draft", "text": out / "draft-text"}
        runs = {
            (trained, shown): measure(out / "target", folders[trained], shown)
            for trained in INPUTS
            for shown in INPUTS
        }
        print(table(runs))


def _save_pictures(out: Path) -> None:
    from PIL import Image  # the extra aerie[images]

    random = torch.Generator().manual_seed(0)
    for names in PICTURES:
        pixels = picture(names, random).permute(1, 2, 0).contiguous()
        Image.frombytes("RGB", (SIDE, SIDE), pixels.numpy().tobytes()).save(out / f"{names[0]}.png")


if __name__ == "__main__":
    main()
