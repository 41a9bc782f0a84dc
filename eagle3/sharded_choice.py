"""The target's choice where every rank has the logits of a part of the vocabulary only.

What is exchanged does not grow with the vocabulary: one key per row for the choice, one for the
maximum, and for top-k and top-p the few hundred integers of `sharded_search`. Integers, so that no
order of reduction and no number of ranks changes a choice, and every rank makes the same one.

Letters: T rows, V this rank's part of the vocabulary.
"""

import torch
from torch import Tensor

from aerie.eagle3.sharded_search import MassSearch
from aerie.kernels.argmax import argmax_keys, argmax_keys_ref, chosen_ids
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.choice_key import key_id, key_value
from aerie.kernels.draw import draw_keys, draw_keys_ref
from aerie.kernels.row_filter import RowFilter
from aerie.llama4.communicator import Communicator


class ShardedChoice:
    """Greedy and drawn ids of whole rows, from this rank's columns of them."""

    def __init__(
        self, communicator: Communicator, vocab_size: int, backend: ResolvedBackend
    ) -> None:
        self._communicator, self._vocab_size = communicator, vocab_size
        self._first = communicator.shard.part(vocab_size).start
        self._argmax_keys = pick(backend, argmax_keys, argmax_keys_ref)
        self._draw_keys = pick(backend, draw_keys, draw_keys_ref)

    def greedy(self, logits_TV: Tensor) -> Tensor:
        """As `argmax`: int64 [T], -1 where a whole row is no distribution."""
        return chosen_ids(self._largest(logits_TV))

    def drawn(
        self,
        logits_TV: Tensor,
        seeds_T: Tensor,
        positions_T: Tensor,
        temperature_T: Tensor,
        top_k_T: Tensor | None = None,
        top_p_T: Tensor | None = None,
        min_p_T: Tensor | None = None,
    ) -> Tensor:
        """As `row_filter` and `draw`: int64 [T], -1 where a whole row is no distribution."""
        largest_T = self._largest(logits_TV)
        maximum_T = key_value(largest_T)
        maximum_T = maximum_T.masked_fill(~maximum_T.isfinite(), torch.nan)
        is_greedy_T = temperature_T == 0
        scale_T = torch.where(is_greedy_T, 1.0, 1 / temperature_T)
        if top_k_T is not None or top_p_T is not None or min_p_T is not None:
            q_TV = ((logits_TV.float() - maximum_T[:, None]) * scale_T[:, None]).exp()
            is_kept_TV = torch.ones_like(q_TV, dtype=torch.bool)
            if top_k_T is not None or top_p_T is not None:
                search = MassSearch(self._communicator, self._vocab_size, logits_TV, q_TV)
                is_kept_TV = search.kept(top_k_T, top_p_T)
            if min_p_T is not None:
                is_kept_TV &= q_TV >= min_p_T.clamp(max=1)[:, None]
            logits_TV = logits_TV.masked_fill(~is_kept_TV, -torch.inf)
        least_T = torch.full_like(maximum_T, -torch.inf)
        no_id_T = torch.full_like(largest_T, -1, dtype=torch.int32)
        all_above = RowFilter(maximum_T, scale_T, least_T, no_id_T, least_T)
        keys_T = self._draw_keys(logits_TV, all_above, seeds_T, positions_T, self._first)
        is_greedy_T = is_greedy_T & maximum_T.isfinite()
        return key_id(torch.where(is_greedy_T, largest_T, self._communicator.all_max(keys_T)))

    def _largest(self, logits_TV: Tensor) -> Tensor:
        return self._communicator.all_max(self._argmax_keys(logits_TV, self._first))
