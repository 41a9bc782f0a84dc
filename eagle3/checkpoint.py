"""Tensor names of Eagle3 checkpoints, which parts a file brings itself, and its vocabulary map."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aerie.eagle3.config import Eagle3Config
from aerie.llama4.checkpoint import Renaming, read_tensors, renamed
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.stored_tensors import stored_tensors

MEMBERSHIP = ("t2d", "model.t2d")  # implied by `d2t`; only checked against it
EMBEDDING, HEAD, MAP = "embed_tokens.weight", "lm_head.weight", "d2t"
EXPERTS = ("midlayer.mlp.router.", "midlayer.mlp.experts.")
ELSEWHERE = ("membership", "identity")  # vocabulary maps that are not read from `d2t`
QUANTISED = ("weight_scale", "weight_scale_2", "weight_scale_inv", "weight_packed", "qweight")
PREFIXES = {
    "midlayer.feed_forward.": "midlayer.mlp.",
    "layers.0.feed_forward.": "midlayer.mlp.",
    "model.midlayer.feed_forward.": "midlayer.mlp.",
    "model.layers.0.feed_forward.": "midlayer.mlp.",
    "layers.0.": "midlayer.",
    "model.layers.0.": "midlayer.",
    "model.": "",
}
RENAME = Renaming(prefixes=PREFIXES, ignored=MEMBERSHIP)


@dataclass(frozen=True)
class OwnParts:
    """Which of the two large matrices a draft has itself; it shares the target's otherwise."""

    embedding: bool = False
    head: bool = True


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors, as this package has them. Raises CheckpointError."""
    return set(renamed(stored_tensors(folder), RENAME))


def own_parts(names: set[str], config: Eagle3Config) -> OwnParts:
    """What a file with the tensors `names` (renamed) brings; a head that must be there counts.

    A head may be absent where it would be the target's own: over the full vocabulary, or where the
    config (`has_lm_head`) or the reader (`lm_head` "target") says so. Raises CheckpointError where
    it would be the draft's embedding: SGLang reads `tie_word_embeddings` so.
    """
    is_full = config.draft_vocab_size == config.vocab_size
    may_lack = is_full or config.shares_target_head
    match config.reading.lm_head:
        case "target":
            head = False
        case "own":
            head = True
        case None:
            head = HEAD in names or not may_lack
            if not head and config.ties_own_head:
                raise CheckpointError(
                    f"config key 'tie_word_embeddings': true and no {HEAD}, so the head would be "
                    f"the draft's embedding, which is not implemented; store it as {HEAD}, or take "
                    f"the target's (lm_head 'target')"
                )
    return OwnParts(EMBEDDING in names, head)


def renaming(parts: OwnParts, config: Eagle3Config) -> Renaming:
    """Leaves out a head that is not wanted, and a `d2t` that the map is not read from."""
    unwanted = () if parts.head else (HEAD, f"model.{HEAD}")
    if config.reading.vocabulary_map in ELSEWHERE:
        unwanted += (MAP, f"model.{MAP}")
    return Renaming(prefixes=PREFIXES, ignored=MEMBERSHIP + unwanted)


def optional_tensors(config: Eagle3Config) -> tuple[str, ...]:
    """The map may be absent where it is the identity, or is not what the map is read from."""
    is_full = config.draft_vocab_size == config.vocab_size
    return (MAP,) if is_full or config.reading.vocabulary_map in ELSEWHERE else ()


def check_is_dense(names: set[str]) -> None:
    """Raises CheckpointError for a mixture-of-experts layer, by its tensors: configs list one even
    where transformers has derived it."""
    if any(name.startswith(EXPERTS) for name in names):
        raise CheckpointError(
            "config key 'moe_layers': the draft's layer is a mixture of experts (it has router or "
            "expert tensors); supported is a dense feed-forward"
        )


def check_is_unquantised(names: set[str]) -> None:
    """Raises CheckpointError for quantised weights, by their tensors: ModelOpt's older exports say
    so in a file of their own, `hf_quant_config.json`."""
    quantised = sorted(name for name in names if name.endswith(QUANTISED))
    if quantised:
        raise CheckpointError(
            f"draft: its weights are quantised ({quantised[0]} and {len(quantised) - 1} more such "
            f"tensors); supported are float16, bfloat16 and float32, so store it unquantised"
        )


def read_vocabulary_map(folder: Path, config: Eagle3Config) -> Tensor:
    """Offsets `d2t` [U], int64, as `config.reading` wants them read. Raises CheckpointError.

    Zeros where there is no map or one of the wrong shape or type, which loading complains about.
    """
    found = read_tensors(folder, _maps)
    size, how = config.draft_vocab_size, config.reading.vocabulary_map or "offsets"
    t2d_V, d2t_U = found.get("t2d"), found.get(MAP)
    nothing_U = torch.zeros(size, dtype=torch.int64)
    if how == "identity":
        return nothing_U
    if how == "membership":
        return _offsets(_members(t2d_V, size, folder))
    if d2t_U is not None and d2t_U.is_floating_point():
        raise CheckpointError(
            f"{folder}: d2t is {str(d2t_U.dtype).removeprefix('torch.')}, which rounds large "
            f"numbers, so its ids are lost; vocabulary_map 'membership' takes them from t2d"
        )
    if d2t_U is None or d2t_U.shape != (size,) or d2t_U.dtype not in (torch.int32, torch.int64):
        return nothing_U
    d2t_U = _offsets(d2t_U.long()) if how == "target_ids" else d2t_U.long()
    check_vocabulary_map(d2t_U, t2d_V, config.vocab_size, folder)
    return d2t_U


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
            f"d2t holds offsets to the draft id, not target ids (vocabulary_map 'target_ids' "
            f"reads those)"
        )
    if len(d2t_U) > 1 and torch.equal(d2t_U.cpu(), torch.arange(len(d2t_U))):
        raise CheckpointError(
            f"{folder}: d2t is 0, 1, 2, ...: target ids where offsets belong (vocabulary_map "
            f"'identity' if the draft knows the first ids)"
        )
    if t2d_V is not None and not _agrees(t2d_V, ids_U, vocab_size):
        raise CheckpointError(f"{folder}: t2d does not mark exactly the target ids j + d2t[j]")
    if len(d2t_U) < vocab_size and not bool(d2t_U.any()):
        raise CheckpointError(
            f"{folder}: d2t is all zero, but the draft vocabulary ({len(d2t_U)}) is smaller than "
            f"the target's ({vocab_size}); the map was lost when the draft was saved"
        )


def _maps(name: str) -> str | None:
    return {"d2t": MAP, "model.d2t": MAP, "t2d": "t2d", "model.t2d": "t2d"}.get(name)


def _offsets(ids_U: Tensor) -> Tensor:
    return ids_U - torch.arange(len(ids_U))


def _members(t2d_V: Tensor | None, size: int, folder: Path) -> Tensor:
    """The target ids that `t2d` marks, ascending as kept ids are stored."""
    ids = None if t2d_V is None or t2d_V.ndim != 1 else t2d_V.nonzero().flatten()
    if ids is None or len(ids) != size:
        marked = "absent" if ids is None else f"{len(ids)} ids are marked"
        raise CheckpointError(f"{folder}: t2d must mark {size} target ids to be the map; {marked}")
    return ids


def _agrees(t2d_V: Tensor, ids_U: Tensor, vocab_size: int) -> bool:
    expected_V = torch.zeros(vocab_size, dtype=torch.bool)
    expected_V[ids_U.cpu()] = True
    return torch.equal(t2d_V.bool(), expected_V)
