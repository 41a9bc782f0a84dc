"""Tensor names and the vocabulary map of raw (SafeAI / SpecForge) Eagle3 checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from aerie.llama4.checkpoint import Renaming
from aerie.llama4.json_fields import CheckpointError

# `t2d` is the membership mask that `d2t` already implies
RENAME = Renaming(
    prefixes={
        "midlayer.feed_forward.": "midlayer.mlp.",
        "layers.0.feed_forward.": "midlayer.mlp.",
        "model.midlayer.feed_forward.": "midlayer.mlp.",
        "model.layers.0.feed_forward.": "midlayer.mlp.",
        "layers.0.": "midlayer.",
        "model.layers.0.": "midlayer.",
        "model.": "",
    },
    ignored=("t2d", "model.t2d"),
)


def check_vocabulary_map(d2t_U: Tensor, vocab_size: int, folder: Path) -> None:
    """`d2t` holds offsets: draft id j is target id j + d2t[j]. A wrong map is a silent dead draft.

    Kept ids are stored ascending, so the target ids must rise strictly within the vocabulary; a
    reduced vocabulary with no offsets at all would mean "the first ids", which no training makes.
    """
    ids_U = torch.arange(len(d2t_U), device=d2t_U.device) + d2t_U
    inside = bool(((ids_U >= 0) & (ids_U < vocab_size)).all())  # all of them: a sum may wrap
    if not inside or not bool((ids_U.diff() > 0).all()):
        raise CheckpointError(
            f"{folder}: j + d2t[j] must rise strictly within 0..{vocab_size - 1}; "
            f"d2t holds offsets to the draft id, not target ids"
        )
    if len(d2t_U) < vocab_size and not bool(d2t_U.any()):
        raise CheckpointError(
            f"{folder}: d2t is all zero, but the draft vocabulary ({len(d2t_U)}) is smaller than "
            f"the target's ({vocab_size}); the map was lost when the draft was saved"
        )
