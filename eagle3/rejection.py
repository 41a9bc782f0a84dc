"""Multi-round rejection over sampled siblings: the rule for drafts that were drawn, not chosen.

    p_1 = p, q_1 = q;  for the siblings x_1, x_2, ... in the order they were drawn:
        accept x_i with probability min(1, p_i(x_i) / q_i(x_i)), else
        p_{i+1} = (p_i - q_i)+ / sum,   q_{i+1} = q_i without x_i / sum
    none accepted: draw from what is left of p

Leviathan et al. 2023, for one sibling; the recursion for several drawn from q without replacement
is that of recursive rejection sampling. What comes out is distributed as p exactly, provided that
q is the distribution the siblings really were drawn from. `choose` is the rule as a function of
numbers only: coins and draws are the caller's (`Chance`), so that a test can take every one of
their outcomes. `walk` is the same rule down the trees of a batch, on the device.

What is verified must not depend on the drawn token itself: a node that is left out because it came
out improbable leaves a distribution that is not q. Stopping *behind* a token that is verified is
free of that. So confidence stops are fine here, and cuts by the nodes' own scores are not.

Letters: B sequences, N rows of a tree, S siblings, U draft vocabulary, V target vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Chance(Protocol):
    """Where the outcomes come from."""

    def accepts(self, probability: float) -> bool: ...

    def draws(self, p_V: Tensor) -> int: ...


@dataclass(frozen=True)
class Uniforms:
    """Outcomes by given uniforms in [0, 1), one for every sibling and one for the draw."""

    of_siblings: Sequence[float]
    of_draw: float
    _next: list[int]

    @classmethod
    def of(cls, of_siblings: Sequence[float], of_draw: float) -> "Uniforms":
        return cls(of_siblings, of_draw, [0])

    def accepts(self, probability: float) -> bool:
        """Strictly below: a probability of 0 is never accepted, not even by a uniform of 0."""
        uniform = self.of_siblings[self._next[0]]
        self._next[0] += 1
        return uniform < probability

    def draws(self, p_V: Tensor) -> int:
        """The first id whose cumulative probability lies above the uniform."""
        is_above_V = (p_V.cumsum(0) > self.of_draw * p_V.sum()) & (p_V > 0)
        return int(is_above_V.int().argmax()) if is_above_V.any() else int(p_V.nonzero()[-1])


def choose(p_V: Tensor, q_V: Tensor, siblings: Sequence[int], chance: Chance) -> int:
    """The emitted token: an accepted sibling, or a draw from the last residual.

    `p_V` and `q_V` are distributions in float32 or float64, `siblings` distinct. Raises ValueError
    for a sibling that q cannot have drawn.
    """
    for sibling in siblings:
        if not q_V[sibling] > 0:
            raise ValueError(f"siblings: {sibling} has probability 0 in q, or was tried before")
        if chance.accepts(min(1.0, float(p_V[sibling] / q_V[sibling]))):
            return sibling
        p_V, q_V = residual(p_V, q_V), without(q_V, sibling)
    return chance.draws(p_V)


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """(p - q)+, normalised; p where nothing is left, which p = q reaches by rounding alone.

    Of one distribution or of a batch of them, as `without`.
    """
    left_V = (p_V - q_V).clamp(min=0)
    total = left_V.sum(-1, keepdim=True)
    return torch.where(total > 0, left_V / total, p_V)


def without(q_V: Tensor, token: int | Tensor) -> Tensor:
    """q given that it is not `token` (an id, or one of every row [B, 1]); zero if that was all."""
    token = torch.as_tensor(token, device=q_V.device).expand(*q_V.shape[:-1], 1)
    left_V = q_V.scatter(-1, token, 0.0)
    return left_V / left_V.sum(-1, keepdim=True).clamp(min=torch.finfo(q_V.dtype).tiny)


@dataclass(frozen=True)
class Drawn:
    """How the nodes of a batch of trees were drawn; the shape is that of every sequence.

    `children_NS` are the rows of the nodes behind each row in the order they were drawn, -1: none,
    and `ranks_N` the place of every node among its siblings. `probs_BNU` (float32) is what the
    nodes behind a row were drawn from; of a row without any, anything. `ids_U` are the target ids
    of the draft vocabulary.
    """

    children_NS: Tensor
    ranks_N: Tensor
    probs_BNU: Tensor
    ids_U: Tensor

    def target_probs(self, row_B: Tensor, vocabulary: int) -> Tensor:
        """q [B, V] behind one row of every sequence: 0 for what the draft cannot say."""
        probs_BU = self.probs_BNU[torch.arange(len(row_B), device=row_B.device), row_B]
        q_BV = probs_BU.new_zeros(len(row_B), vocabulary)
        return q_BV.index_copy_(1, self.ids_U, probs_BU)


def walk(
    p_of_rows: Callable[[Tensor], Tensor],
    tokens_BN: Tensor,
    drawn: Drawn,
    coins_BN: Tensor,
    pick: Callable[[Tensor, Tensor], Tensor],
    depth: int,
) -> Tensor:
    """The token behind every row of the walks [B, N]: of an accepted node, and at the end the one
    drawn from what is left. -1 behind other rows, and where nothing can be drawn. At most `depth`
    levels; nothing is read.

    `p_of_rows` gives the target's distributions [B, V] behind one row of every sequence, `coins_BN`
    a uniform in [0, 1) for every node, and `pick` draws from distributions [B, V] of tokens so many
    levels under the roots [B]; it gives -1 where one is none (NaN, which accepts nothing).
    """
    row_B = torch.zeros_like(tokens_BN[:, 0])
    is_open_B, end_B = torch.ones_like(row_B, dtype=torch.bool), row_B
    chosen_BN, left_BV = torch.full_like(tokens_BN, -1), torch.empty(0)
    for level in range(depth + 1):
        child_B, p_BV = _child(p_of_rows(row_B), row_B, tokens_BN, drawn, coins_BN)
        left_BV = p_BV if level == 0 else torch.where(is_open_B[:, None], p_BV, left_BV)
        end_B = torch.where(is_open_B, level, end_B)
        is_open_B = is_open_B & (child_B >= 0)
        token_B1 = tokens_BN.gather(1, child_B.clamp(min=0)[:, None])
        known_B1 = chosen_BN.gather(1, row_B[:, None])
        token_B1 = torch.where(is_open_B[:, None], token_B1, known_B1)
        chosen_BN = chosen_BN.scatter(1, row_B[:, None], token_B1)
        row_B = torch.where(is_open_B, child_B, row_B)
    return chosen_BN.scatter(1, row_B[:, None], pick(left_BV, 1 + end_B)[:, None])


def _child(
    p_BV: Tensor, row_B: Tensor, tokens_BN: Tensor, drawn: Drawn, coins_BN: Tensor
) -> tuple[Tensor, Tensor]:
    """The accepted child of each row (-1: none), and what is left of p behind the rejected ones."""
    q_BV = drawn.target_probs(row_B, p_BV.shape[1]).to(p_BV.dtype)
    accepted_B = torch.full_like(row_B, -1)
    for child_B in drawn.children_NS[row_B].unbind(1):
        at_B1 = child_B.clamp(min=0)[:, None]
        token_B1 = tokens_BN.gather(1, at_B1)
        p_B, q_B = p_BV.gather(1, token_B1)[:, 0], q_BV.gather(1, token_B1)[:, 0]
        is_tried_B = (child_B >= 0) & (accepted_B < 0)
        # where p = q but for rounding nothing would be left: such a token is always accepted
        is_sure_B = (p_B > 0) & ~(p_BV > q_BV).any(-1)
        is_accepted_B = is_tried_B & ((coins_BN.gather(1, at_B1)[:, 0] * q_B < p_B) | is_sure_B)
        is_rejected_B1 = (is_tried_B & ~is_accepted_B)[:, None]
        accepted_B = torch.where(is_accepted_B, child_B, accepted_B)
        rest_BV, without_BV = residual(p_BV, q_BV), without(q_BV, token_B1)
        p_BV = torch.where(is_rejected_B1, rest_BV, p_BV)
        q_BV = torch.where(is_rejected_B1, without_BV, q_BV)
    return accepted_B, p_BV
