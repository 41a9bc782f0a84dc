"""Verification: one target pass over the root and the drafted nodes, then the walk.

Every emitted token is the target's own choice given exactly the tokens before it (`sampler`); the
draft only decides how many of them one pass yields.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.interface import SupportsEagle3
from aerie.eagle3.sampler import Sampler
from aerie.eagle3.tree import DraftTree
from aerie.kernels.accept import accept, accept_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.image_features import ImageFeatures


@dataclass(frozen=True)
class Verified:
    """`path`: committed rows; `tokens`: the new ones, the target's own (bonus) token last; none
    behind a part of a prompt.

    `next_ids` holds, for every committed row, the token of the position after it, and
    `aux_hidden_states` the row's taps: what the draft is rebuilt from.
    """

    path: list[int]
    tokens: list[int]
    next_ids: list[int]
    aux_hidden_states: tuple[Tensor, ...]


class Verifier:
    """Checks drafts against `target`, whose cache holds all tokens before the root."""

    def __init__(
        self,
        target: SupportsEagle3,
        cache: PagedKVCache,
        sampler: Sampler,
        backend: ResolvedBackend,
        tap_layers: tuple[int, ...] = (),
    ) -> None:
        """`tap_layers` are set before every pass: other drafts may share the target."""
        self.target = target
        self.cache = cache
        self.tap_layers = tap_layers
        self.sampler = sampler
        self._accept = pick(backend, accept, accept_ref)

    def prefill(
        self,
        ids: Sequence[int],
        following: Sequence[int] = (),
        images: ImageFeatures | None = None,
    ) -> Verified:
        """Commits known tokens, or those of the prompt's `images` that stand among them.

        `following` starts with the next known token, if there is one.
        """
        start = self.cache.lengths[0]
        step = self.cache.causal_step(len(ids))
        device = step.slots_T.device
        ids_T = torch.tensor(ids, device=device)
        embeds_TD = None
        if images is not None and images.reach(start, start + len(ids)):
            embeds_TD = images.over(self.target.get_input_embeddings(ids_T), start)
        last_row = torch.tensor([len(ids) - 1], device=device)
        self.target.set_aux_hidden_state_layers(self.tap_layers)
        output = self.target(ids_T, step, last_row, embeds_TD)
        path = list(range(len(ids)))
        self.cache.commit(0, path)
        if following:
            return Verified(path, [], [*ids[1:], following[0]], output.aux_hidden_states)
        root = ids_T[-1:], torch.full_like(last_row, -1), step.rows.positions_T[-1:]
        tokens = self._legal(self.sampler.choose(output.logits_TV, *root).tolist())
        return Verified(path, tokens, [*ids[1:], *tokens], output.aux_hidden_states)

    def verify(self, root_T: Tensor, draft: DraftTree) -> Verified:
        """Commits the root and the accepted nodes behind it."""
        tokens_T = torch.cat((root_T, draft.tokens_N))
        step = self.cache.tree_step(draft.shape)
        self.target.set_aux_hidden_state_layers(self.tap_layers)
        output = self.target(tokens_T, step)
        parents_T = draft.parents()
        acceptance = self._accept(
            tokens_T,
            parents_T,
            self.sampler.choose(output.logits_TV, tokens_T, parents_T, step.rows.positions_T),
            step.rows.row_starts_B1,
            1 + draft.depth,
        )
        # one read of the device per round
        path, ids = torch.cat((acceptance.path_BP, acceptance.ids_BP)).tolist()
        length = path.index(-1) if path[-1] < 0 else len(path)
        path = path[:length]
        self.cache.commit(0, path)
        tokens = self._legal(ids[:length])
        return Verified(path, tokens, tokens, self._rows(output.aux_hidden_states, path))

    def _legal(self, tokens: list[int]) -> list[int]:
        """A negative id marks a row whose logits are no distribution."""
        if tokens[-1] < 0:
            raise FloatingPointError(
                f"no token can be chosen for position {self.cache.lengths[0]}: the target's logits "
                f"there contain NaN or +inf, or all are -inf"
            )
        return tokens

    @staticmethod
    def _rows(aux: Sequence[Tensor], path: list[int]) -> tuple[Tensor, ...]:
        if path == list(range(len(path))):
            return tuple(tap_TD[: len(path)] for tap_TD in aux)
        return tuple(tap_TD[path] for tap_TD in aux)
