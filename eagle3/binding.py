"""What ties a loaded draft to its target: shared matrices, and whether the two fit at all."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.checkpoint import OwnParts
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.reading import Decision
from aerie.kernels.backend import ResolvedBackend
from aerie.kernels.embedding import Embedding
from aerie.kernels.head_rows import head_rows, ids_from_offsets
from aerie.kernels.linear import Linear
from aerie.llama4.communicator import Communicator
from aerie.llama4.config import Llama4Config
from aerie.llama4.json_fields import CheckpointError, read_fields
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.packing import lay_out_for_eager


@dataclass(frozen=True)
class Shared:
    """The target's two large matrices; None: the draft has its own."""

    embedding: Embedding | None
    head: Linear | None


def check_fits(config: Eagle3Config, parts: OwnParts, target: Llama4Config) -> None:
    """Raises CheckpointError listing what keeps the draft from serving this target."""
    read_fields(
        {
            "target_hidden_size": lambda: _check_taps_width(config, target),
            "hidden_size": lambda: _check_shared_width(config, parts, target),
            "vocab_size": lambda: _check_vocabulary(config, target),
        }
    )


def draft_head(head: Linear, d2t_U: Tensor, backend: ResolvedBackend) -> Linear:
    """The target's head itself, or a copy of the rows that the draft vocabulary keeps."""
    if len(d2t_U) == head.weight.shape[0]:
        return head
    cut = Linear(head.weight.shape[1], 1, False, backend)
    rows_UD = head_rows(head.weight, ids_from_offsets(d2t_U), backend)
    cut.weight = torch.nn.Parameter(rows_UD, requires_grad=False)
    if backend == "eager":
        lay_out_for_eager(cut)
    return cut


def is_copy(
    own: Embedding, shared: Embedding | None, communicator: Communicator | None = None
) -> bool:
    """Whether a draft brought the target's embedding along, which need not be held twice.

    With a `communicator`, of parts on every rank: whether all are.
    """
    if shared is None:
        return False
    is_same = own.weight.shape == shared.weight.shape and torch.equal(own.weight, shared.weight)
    if communicator is None:
        return is_same
    differs = torch.tensor([not is_same], dtype=torch.int64, device=own.weight.device)
    return not communicator.all_max(differs).item()


def swap_input_halves(qkv_FD: Tensor) -> None:
    """In place: columns for [hidden, embedding] become columns for [embedding, hidden]."""
    qkv_FD.copy_(qkv_FD.roll(qkv_FD.shape[1] // 2, 1))


def tap_layers(config: Eagle3Config, target: Llama4ForCausalLM) -> tuple[int, ...]:
    """The config's tap ids, or the target's default. Raises CheckpointError if unusable."""
    is_default = config.aux_hidden_state_layers is None
    layers = config.aux_hidden_state_layers or target.get_eagle3_default_aux_hidden_state_layers()
    if len(layers) != config.num_taps:
        raise CheckpointError(f"taps: fc reads {config.num_taps}, the ids are {layers}")
    depth = target.config.num_hidden_layers
    if len(set(layers)) != len(layers) or not set(layers) <= set(range(depth + 1)):
        origin = "the target's default" if is_default else "from the draft's config"
        raise CheckpointError(
            f"config key 'eagle_aux_hidden_state_layer_ids': {layers}, {origin}, must be "
            f"distinct and within 0..{depth} (inputs of the target's layers)"
        )
    return layers


def sharing_decisions(
    config: Eagle3Config, parts: OwnParts, target: Llama4Config
) -> tuple[Decision, ...]:
    """Where the two large matrices come from, and positions beyond the training."""
    is_full = config.draft_vocab_size == config.vocab_size
    cut = "the target's" if is_full else f"{config.draft_vocab_size} rows of the target's"
    embedding = ("its own", "in the file") if parts.embedding else ("the target's", "shared")
    head = ("its own", "in the file") if parts.head else (cut, "the file has none")
    doubtful = not parts.head and not is_full
    found = [
        Decision("embedding", *embedding),
        Decision("lm_head", *head, logging.WARNING if doubtful else logging.DEBUG),
    ]
    trained, served = config.trained_positions, target.max_position_embeddings
    if trained is not None and trained < served:
        reason = f"trained on {trained} positions; allowed beyond, where acceptance may fall"
        found.append(Decision("positions", f"up to {served}", reason, logging.INFO))
    if config.attention_window is not None:
        reason = "trained with a sliding window, which is not implemented: longer runs are refused"
        found.append(
            Decision("positions", f"up to {config.attention_window}", reason, logging.INFO)
        )
    return tuple(found)


def _check_taps_width(config: Eagle3Config, target: Llama4Config) -> None:
    if config.target_hidden_size != target.hidden_size:
        raise CheckpointError(
            f"draft: target_hidden_size {config.target_hidden_size} is not the target's "
            f"{target.hidden_size}; was it trained for another model?"
        )


def _check_shared_width(config: Eagle3Config, parts: OwnParts, target: Llama4Config) -> None:
    own = {"embedding": parts.embedding, "lm_head": parts.head}
    shared = [name for name, is_own in own.items() if not is_own]
    if shared and config.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"draft: hidden_size {config.hidden_size} is not the target's {target.hidden_size}, "
            f"whose {' and '.join(shared)} it would share: a narrower draft must bring its own"
        )


def _check_vocabulary(config: Eagle3Config, target: Llama4Config) -> None:
    if config.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"draft: vocab_size {config.vocab_size} is not the target's {target.vocab_size}; "
            f"the two must share a tokenizer"
        )
