"""A draft that is cut over the target's ranks: `draft_tensor_parallel_size` as the target's.

Attention by heads, MLP by width, head and embedding by vocabulary; fc and the norms are whole on
every rank, as in vLLM. Every rank drafts the same tokens: what they choose from is exchanged, the
best k of each rank and the mass of its part, never logits.
"""

import torch
from torch import Tensor

from aerie.eagle3.checkpoint import OwnParts
from aerie.eagle3.config import Eagle3Config
from aerie.kernels.choice_key import choice_key, key_id, key_value
from aerie.kernels.draft_vocab import DraftTokens
from aerie.llama4.communicator import Communicator
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.sharding import Shard, sizes_for
from aerie.llama4.stored_shards import RankReader


def check_draft_shard(config: Eagle3Config, parts: OwnParts, shard: Shard) -> None:
    """Raises ValueError, naming what does, where this draft cannot be cut so."""
    if shard.size == 1:
        return
    attention = config.attention
    sizes = sizes_for(attention.num_heads, (config.intermediate_size, config.draft_vocab_size))
    if shard.size not in sizes:
        raise ValueError(
            f"draft_tensor_parallel_size: must divide the draft's {attention.num_heads} heads: one "
            f"of {', '.join(map(str, sizes))}; got {shard.size}; 1 keeps the draft whole"
        )
    has_rows_of_head = not parts.head and config.draft_vocab_size != config.vocab_size
    if attention.bias or has_rows_of_head:
        what = "attention_bias" if attention.bias else "chosen rows of the target's head"
        raise CheckpointError(f"draft_tensor_parallel_size: a draft with {what} is not cut; use 1")


def draft_reader(config: Eagle3Config, shard: Shard) -> RankReader:
    """Which slices of a draft's file a rank reads."""
    return RankReader(shard, config.attention.num_heads, config.attention.num_kv_heads, 0)


def own_map(d2t_U: Tensor, shard: Shard) -> Tensor:
    """Offsets from this rank's draft ids, which begin at 0, to target ids."""
    part = shard.part(len(d2t_U))
    return d2t_U[part] + part.start


def merged(own: DraftTokens, communicator: Communicator) -> DraftTokens:
    """The k likeliest of the whole vocabulary, from the k likeliest of every rank's part."""
    k = own.ids_TA.shape[1]
    logits_TA = own.logprobs_TA + own.logsumexp_T[:, None]
    mass_T1 = own.logsumexp_T.view(torch.int32).long()[:, None]
    sent_TA = torch.cat((choice_key(logits_TA, own.ids_TA), mass_T1), dim=1)
    received_NTA = communicator.all_gather(sent_TA)
    logsumexp_T = received_NTA[:, :, -1].int().view(torch.float32).logsumexp(dim=0)
    keys_TA = received_NTA[:, :, :-1].transpose(0, 1).flatten(1)
    best_TA = keys_TA.sort(dim=1, descending=True).values[:, :k]
    logprobs_TA = key_value(best_TA) - logsumexp_T[:, None]
    return DraftTokens(key_id(best_TA), logprobs_TA, logsumexp_T)
