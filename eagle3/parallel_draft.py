"""The draft of a target that is cut over ranks: on rank 0 alone, or cut as the target is.

With `draft_tensor_parallel_size` 1 rank 0 drafts and broadcasts what it drafted. The other ranks
hold nothing of the draft, and need no promise that two of them would compute the same bits. What
the draft shares with the target is collected once: the target's own matrices lie in parts.
"""

import weakref
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from aerie.eagle3.binding import Shared
from aerie.eagle3.checkpoint import OwnParts
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.interface import Target
from aerie.eagle3.reading import AS_WRITTEN, Reading
from aerie.eagle3.registry import load_draft, resolve
from aerie.kernels.backend import Backend
from aerie.kernels.embedding import Embedding
from aerie.kernels.linear import Linear
from aerie.llama4.checkpoint import Progress
from aerie.llama4.communicator import Communicator
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import read_json
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.packing import lay_out_for_eager


class RemoteDraft:
    """What the other ranks have of a draft on rank 0: the target it was loaded for."""

    def __init__(self, target: Llama4ForCausalLM) -> None:
        self._target = weakref.ref(target)

    def is_bound_to(self, target: Target) -> bool:
        """Whether this is the target that rank 0 loaded its draft for."""
        return self._target() is target.get_language_model()


def load_parallel_draft(
    path: str | Path,
    target: Target,
    backend: Backend | None = None,
    reading: Reading = AS_WRITTEN,
    *,
    tensor_parallel_size: int = 1,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Eagle3Llama4ForCausalLM | RemoteDraft:
    """As `load_draft`, for any target; every rank of it must come here.

    `tensor_parallel_size` is 1 or the target's. Raises ValueError for another, and CheckpointError
    on all ranks for what one of them cannot load.
    """
    target = target.get_language_model()
    communicator = target.communicator
    size = 1 if communicator is None else communicator.shard.size
    check_draft_size(tensor_parallel_size, size)
    if communicator is None:
        return load_draft(path, target, backend, reading, revision=revision, progress=progress)

    def read(draft_communicator: Communicator | None) -> Eagle3Llama4ForCausalLM:
        folder = resolve_folder(path, revision)
        draft_class = resolve(read_json(folder / "config.json")).draft_class
        return draft_class.read(
            folder, target, backend, reading, progress=progress, communicator=draft_communicator
        )

    if tensor_parallel_size > 1:
        draft = communicator.together(partial(read, communicator))
        draft.bind(target)
        return draft
    is_first = communicator.shard.rank == 0
    draft = communicator.together(lambda: read(None) if is_first else None)
    shared = _collected(target, communicator, communicator.from_first(draft and draft.parts))
    if draft is None:
        return RemoteDraft(target)
    draft.bind(target, shared)
    return draft


def check_draft_size(draft_size: int, size: int) -> int:
    """The draft's size beside a target of `size` ranks. Raises ValueError unless 1 or that."""
    if draft_size not in (1, size) or draft_size is True:
        raise ValueError(
            f"draft_tensor_parallel_size: must be 1{f' or {size}' if size > 1 else ''} (the "
            f"target's size), got {draft_size!r}"
        )
    return draft_size


def _collected(
    target: Llama4ForCausalLM, communicator: Communicator, parts: OwnParts | None
) -> Shared | None:
    """On rank 0, what the draft does not bring itself; the others send their part of it."""
    assert parts is not None, "rank 0 has a draft"
    vocabulary, width = target.config.vocab_size, target.config.hidden_size
    embedding_VD = head_VD = None
    if not parts.embedding:
        embedding_VD = communicator.collect_rows(target.model.embed_tokens.weight, vocabulary)
    if not parts.head:
        head_VD = communicator.collect_rows(target.lm_head.weight, vocabulary)
    if communicator.shard.rank > 0:
        return None
    embedding = head = None
    if embedding_VD is not None:
        embedding = Embedding(0, width, target.backend)
        embedding.weight = _parameter(embedding_VD)
    if head_VD is not None:
        head = Linear(width, 0, False, target.backend)
        head.weight = _parameter(head_VD)
        if target.backend == "eager":
            lay_out_for_eager(head)
    return Shared(embedding, head)


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
