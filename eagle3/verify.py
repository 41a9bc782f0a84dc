"""Verification: one target pass over the roots and the drafted nodes, then the walk.

Every emitted token is the target's own choice given exactly the tokens before it (`sampler`); the
draft only decides how many of them one pass yields.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.batch import Batch
from aerie.eagle3.interface import SupportsEagle3
from aerie.eagle3.sampler import ChoiceRows, Sampler
from aerie.eagle3.tree import DraftTree
from aerie.kernels.accept import Acceptance, accept, accept_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.device_steps import (
    chain_shape,
    commit_paths,
    counting,
    device_step,
    per_row,
)
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_pool import rows_of
from aerie.llama4.step import Step


@dataclass(frozen=True)
class Verified:
    """The target's own token behind every row, and the rows' taps."""

    tokens_BN: Tensor  # what was verified, roots first
    target_ids_T: Tensor
    taps_TD: tuple[Tensor, ...]
    step: Step


class Verifier:
    """Passes of `target` over the sequences of `batch`, whose keys and values `cache` holds."""

    def __init__(
        self,
        target: SupportsEagle3,
        cache: PagedKVCache,
        batch: Batch,
        sampler: Sampler,
        backend: ResolvedBackend,
        tap_layers: tuple[int, ...] = (),
    ) -> None:
        """`tap_layers` go with every pass: other drafts may share the target."""
        self.target, self.cache, self.batch, self.sampler = target, cache, batch, sampler
        self.tap_layers = tap_layers
        self._accept = pick(backend, accept, accept_ref)

    def prefill(
        self, row: int, start: int, ids_T: Tensor, images: ImageFeatures | None, *, is_last: bool
    ) -> Verified:
        """Runs known tokens of sequence `row`, or those of the prompt's `images` that stand among
        them, from position `start` on; if `is_last`, chooses the token behind them."""
        device, last_row, embeds_TD = ids_T.device, len(ids_T) - 1, None
        if images is not None and images.reach(start, start + len(ids_T)):
            embeds_TD = images.over(self.target.get_input_embeddings(ids_T), start)
        lengths_B = self.batch.lengths_B[row : row + 1]
        step = device_step(self.cache, lengths_B, chain_shape(len(ids_T), device), row)
        last_1 = counting(len(ids_T), device)[last_row:]
        output = self.target(ids_T, step, last_1, embeds_TD, self.tap_layers)
        if not is_last:
            return Verified(ids_T[None], ids_T[:0], output.aux_hidden_states, step)
        root_BN, shape = ids_T[None, last_row:], chain_shape(1, device)
        positions_T = step.rows.positions_T[last_row:]
        rows = ChoiceRows(row, lengths_B + last_row, root_BN, shape, positions_T)
        chosen_T = self.sampler.choose(output.logits_TV, rows)
        return Verified(ids_T[None], chosen_T, output.aux_hidden_states, step)

    def verify(self, sequences: int, draft: DraftTree) -> Verified:
        """One pass over the roots of the first `sequences` and the nodes drafted behind them."""
        batch = self.batch
        lengths_B = rows_of(batch.lengths_B, 0, sequences)
        roots_B1 = rows_of(batch.roots_B, 0, sequences)[:, None]
        tokens_BN = torch.cat((roots_B1, draft.tokens_BN), dim=1)
        step = device_step(self.cache, lengths_B, draft.shape)
        output = self.target(tokens_BN.view(-1), step, aux_layers=self.tap_layers)
        rows = ChoiceRows(0, lengths_B, tokens_BN, draft.shape, step.rows.positions_T)
        chosen_T = self.sampler.choose(output.logits_TV, rows, draft.drawn, draft.depth)
        return Verified(tokens_BN, chosen_T, output.aux_hidden_states, step)

    def accept(self, draft: DraftTree, verified: Verified) -> Acceptance:
        """How far the drafted tokens are the target's own."""
        parents_T = per_row(draft.shape.parents_N, len(verified.tokens_BN))
        return self._accept(
            verified.tokens_BN.view(-1),
            parents_T,
            verified.target_ids_T,
            verified.step.rows.row_starts_B1,
            1 + draft.depth,
        )

    def commit(self, draft: DraftTree, verified: Verified, accepted: Acceptance) -> None:
        """Keeps the accepted rows: their keys, values and taps, and the tokens behind them."""
        path_BP, sequences = accepted.path_BP, len(accepted.path_BP)
        if draft.is_chain:
            taps_BPD = [tap_TD.view(*path_BP.shape, -1) for tap_TD in verified.taps_TD]
        else:
            lengths_B = rows_of(self.batch.lengths_B, 0, sequences)
            commit_paths(self.cache, lengths_B, path_BP)
            first_B = counting(sequences, path_BP.device) * verified.tokens_BN.shape[1]
            rows_BP = path_BP.clamp(min=0) + first_B[:, None]
            taps_BPD = [tap_TD[rows_BP] for tap_TD in verified.taps_TD]
        needs_ids = self.sampler.needs_ids(sequences)
        self.batch.commit(accepted, taps_BPD, keep_ids=needs_ids)
