"""Tensor names and the vocabulary map of raw (SafeAI / SpecForge) Eagle3 checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from aerie.llama4.checkpoint import Renaming, read_tensors
from aerie.llama4.json_fields import CheckpointError

MEMBERSHIP = ("t2d", "model.t2d")  # implied by `d2t`; only checked against it
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
    ignored=MEMBERSHIP,
)


def read_membership(folder: Path) -> Tensor | None:
    """`t2d` [V] bool, the target ids the draft knows; None if the file has none."""
    found = read_tensors(folder, lambda name: "t2d" if name in MEMBERSHIP else None)
    return found.get("t2d")


def check_vocabulary_map(
    d2t_U: Tensor, t2d_V: Tensor | None, vocab_size: int, folder: Path
) -> None:
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
    if len(d2t_U) > 1 and torch.equal(d2t_U.cpu(), torch.arange(len(d2t_U))):
        raise CheckpointError(f"{folder}: d2t is 0, 1, 2, ...: target ids where offsets belong")
    if t2d_V is not None and not _agrees(t2d_V, ids_U, vocab_size):
        raise CheckpointError(f"{folder}: t2d does not mark exactly the target ids j + d2t[j]")
    if len(d2t_U) < vocab_size and not bool(d2t_U.any()):
        raise CheckpointError(
            f"{folder}: d2t is all zero, but the draft vocabulary ({len(d2t_U)}) is smaller than "
            f"the target's ({vocab_size}); the map was lost when the draft was saved"
        )


def _agrees(t2d_V: Tensor, ids_U: Tensor, vocab_size: int) -> bool:
    expected_V = torch.zeros(vocab_size, dtype=torch.bool)
    expected_V[ids_U.cpu()] = True
    return torch.equal(t2d_V.bool(), expected_V)
