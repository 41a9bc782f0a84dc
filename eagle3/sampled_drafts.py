"""Drafts that are drawn instead of chosen, and the chance of their verification (`rejection`).

    siblings behind a row:  the k largest of  log q + Gumbel noise,  largest first

are a draw without replacement from q in that order (Kool et al. 2019), of which one is a draw from
q. q = softmax(draft logits / temperature) in float32, and it is the very q that verification is
told.

Letters: R rows to draw behind, A siblings, U draft vocabulary, B sequences, N rows of a tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.noise import DRAFT, derived_seeds
from aerie.eagle3.rejection import Drawn
from aerie.eagle3.sampler import Sampler
from aerie.kernels.draft_vocab import DraftTokens
from aerie.kernels.gumbel import gumbel_ref
from aerie.kernels.head_rows import ids_from_offsets


@dataclass(frozen=True)
class Siblings:
    """`ids_RA` in the draft's vocabulary, in drawn order, and the q they were drawn from."""

    ids_RA: Tensor
    logprobs_RA: Tensor
    probs_RU: Tensor


class Draws:
    """Draws the drafts of a batch by the temperatures and seeds of its requests."""

    def __init__(self, draft: Eagle3Llama4ForCausalLM, sampler: Sampler) -> None:
        if draft.communicator is not None or sampler.is_cut:
            raise ValueError(
                "verification: 'rejection' needs whole vocabularies, and target or draft are cut "
                "over ranks; take 'match'"
            )
        self._draft, self._sampler = draft, sampler
        self._ids_U = ids_from_offsets(draft.d2t)
        self._probs: list[tuple[Sequence[int], Tensor]] = []  # rows drawn behind, their q

    def siblings(
        self, post_norm_RD: Tensor, positions_B: Tensor, rows: Sequence[int], count: int
    ) -> DraftTokens:
        """`count` tokens behind each of the `rows` of every tree, for `positions_B`. Target ids."""
        sequences, each = len(positions_B), len(rows)
        logits_RU = self._draft.compute_draft_logits(post_norm_RD)
        temperatures_B, seeds_B = self._sampler.temperatures_and_seeds(sequences)
        found = drawn_siblings(
            logits_RU,
            temperatures_B.repeat_interleave(each),
            seeds_B.repeat_interleave(each),
            positions_B.repeat_interleave(each),
            count,
        )
        self._probs.append((rows, found.probs_RU.view(sequences, each, -1)))
        return DraftTokens(self._ids_U[found.ids_RA], found.logprobs_RA, logits_RU[:, 0])

    def drawn(self, parents: Sequence[int]) -> Drawn:
        """What the tree of these rows (`parents[0]`, the root's, is -1) was drawn from."""
        first = self._probs[0][1]
        probs_BNU = first.new_zeros(len(first), len(parents), first.shape[2])
        for rows, probs_BEU in self._probs:
            for row, probs_BU in zip(rows, probs_BEU.unbind(1), strict=True):
                probs_BNU[:, row] = probs_BU  # one by one: a list of rows would be copied over
        self._probs = []
        children_NS, ranks_N = _children(tuple(parents), first.device)
        return Drawn(children_NS, ranks_N, probs_BNU, self._ids_U)


@cache
@torch.inference_mode(False)
def _children(parents: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The children of every row in their order, and the place of every row among its siblings."""
    children: list[list[int]] = [[] for _ in parents]
    ranks = [0] * len(parents)
    for row, parent in enumerate(parents[1:], start=1):
        ranks[row] = len(children[parent])
        children[parent].append(row)
    widest = max(1, *map(len, children))
    padded = [rows + [-1] * (widest - len(rows)) for rows in children]
    return torch.tensor(padded, device=device), torch.tensor(ranks, device=device)


def drawn_siblings(
    logits_RU: Tensor, temperatures_R: Tensor, seeds_R: Tensor, positions_R: Tensor, count: int
) -> Siblings:
    """`count` siblings behind every row; `positions_R` are those of the drawn tokens.

    A greedy request (temperature 0) takes the likeliest without noise. Its target is a point, for
    which any q above 0 is right.
    """
    is_greedy_R1 = (temperatures_R == 0)[:, None]
    scale_R1 = torch.where(is_greedy_R1, 1.0, temperatures_R[:, None])
    log_q_RU = (logits_RU.float() / scale_R1).log_softmax(-1)
    noise_RU = gumbel_ref(derived_seeds(seeds_R, DRAFT), positions_R, logits_RU.shape[1])
    score_RU = log_q_RU + torch.where(is_greedy_R1, 0.0, noise_RU)
    ids_RA = score_RU.topk(count, dim=-1).indices
    return Siblings(ids_RA, log_q_RU.gather(1, ids_RA), log_q_RU.exp())
