"""Multi-round rejection over sampled siblings: the rule for drafts that were drawn, not chosen.

    p_1 = p, q_1 = q;  for the siblings x_1, x_2, ... in the order they were drawn:
        accept x_i with probability min(1, p_i(x_i) / q_i(x_i)), else
        p_{i+1} = (p_i - q_i)+ / sum,   q_{i+1} = q_i without x_i / sum
    none accepted: draw from what is left of p

Leviathan et al. 2023, for one sibling; the recursion for several drawn from q without replacement
is that of recursive rejection sampling. What comes out is distributed as p exactly, provided that
q is the distribution the siblings really were drawn from. A function of numbers only: coins and
draws are the caller's (`Chance`), so that a test can take every one of their outcomes. The
decoding loop does not use this rule yet; it draws and matches (`sampler`).

Letters: V target vocabulary.
"""

from collections.abc import Sequence
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
    """(p - q)+, normalised; p where nothing is left, which p = q reaches by rounding alone."""
    left_V = (p_V - q_V).clamp(min=0)
    total = left_V.sum()
    return left_V / total if total > 0 else p_V


def without(q_V: Tensor, token: int) -> Tensor:
    """q given that it is not `token`; all zero if that was all of it."""
    left_V = torch.where(torch.arange(len(q_V), device=q_V.device) == token, 0.0, q_V)
    return left_V / left_V.sum().clamp(min=torch.finfo(q_V.dtype).tiny)
