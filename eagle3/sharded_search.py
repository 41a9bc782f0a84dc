"""Where top-k and top-p end in rows whose columns lie on several ranks.

The bits of a float32 as an integer (`choice_key.ordered_bits`) rise with it, so a boundary is found
exactly, a digit at a time from the top: at every level the ranks add up how many logits have each
next digit behind the digits found so far, and their mass. Masses are integers in units of 2^-44 of
the largest, as in `row_search`: their sums are the same in every order.

Letters: T rows, V this rank's part of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.kernels.choice_key import ordered_bits
from aerie.llama4.communicator import Communicator

UNIT = 2.0**44
ENDLESS = 2**63 - 1
DIGIT, LEVELS = 8, 4  # bits of a digit; digits of a float32


@dataclass(frozen=True)
class Boundary:
    """The last value that is kept: its digits, what is larger, and its own mass; int64 [T]."""

    digits_T: Tensor
    count_T: Tensor
    mass_T: Tensor
    own_mass_T: Tensor  # of one logit with this value


class MassSearch:
    """Of the logits of some rows, whose share of the largest one's probability is `q_TV`."""

    def __init__(
        self, communicator: Communicator, vocab_size: int, logits_TV: Tensor, q_TV: Tensor
    ) -> None:
        self._communicator, self._vocab_size = communicator, vocab_size
        self._order_TV = ordered_bits(logits_TV).long() + 2**31
        self._mass_TV = (q_TV * UNIT).long()
        self._first = self._histogram(0, torch.zeros_like(self._order_TV[:, 0]))

    def kept(self, top_k_T: Tensor | None, top_p_T: Tensor | None) -> Tensor:
        """Which columns lie within both limits, bool [T, V]; limits as in `row_filter`."""
        num_T = torch.full_like(self._order_TV[:, 0], self._vocab_size)
        endless_T = limit_T = torch.full_like(num_T, ENDLESS)
        if top_k_T is not None:
            num_T = torch.where((top_k_T > 0) & (top_k_T < num_T), top_k_T, num_T)
        if top_p_T is not None:
            total_T = self._first[:, 1].sum(dim=1)
            if top_k_T is not None:
                last = self._boundary(num_T, endless_T)
                total_T = last.mass_T + (num_T - last.count_T) * last.own_mass_T
            wanted_T = (top_p_T.double() * total_T.double()).ceil().long().clamp(min=1)
            limit_T = torch.where(top_p_T < 1, wanted_T, endless_T)
        last = self._boundary(num_T, limit_T)
        one_T = last.own_mass_T.clamp(min=1)
        fitting_T = (limit_T - last.mass_T - 1) // one_T + 1
        return self._down_to(last, torch.minimum(num_T - last.count_T, fitting_T))

    def _boundary(self, num_T: Tensor, limit_T: Tensor) -> Boundary:
        """The lowest value that fewer than `num_T` logits, and less than `limit_T` mass, exceed."""
        digits_T, count_T, mass_T = (torch.zeros_like(num_T) for _ in range(3))
        own_T2 = torch.zeros_like(num_T)[:, None].expand(-1, 2)
        for level in range(LEVELS):
            both_T2D = self._histogram(level, digits_T) if level else self._first
            above_T2D = both_T2D.flip(2).cumsum(2).flip(2) - both_T2D
            fits_TD = (above_T2D[:, 0] + count_T[:, None] < num_T[:, None]) & (
                above_T2D[:, 1] + mass_T[:, None] < limit_T[:, None]
            )
            digit_T = (~fits_TD).sum(dim=1).clamp(max=(1 << DIGIT) - 1)
            at_T21 = digit_T[:, None, None].expand(-1, 2, 1)
            above_T2, own_T2 = (x.gather(2, at_T21)[:, :, 0] for x in (above_T2D, both_T2D))
            digits_T = digits_T << DIGIT | digit_T
            count_T, mass_T = count_T + above_T2[:, 0], mass_T + above_T2[:, 1]
        return Boundary(digits_T, count_T, mass_T, own_T2[:, 1] // own_T2[:, 0].clamp(min=1))

    def _histogram(self, level: int, digits_T: Tensor) -> Tensor:
        """Logits and their mass of every next digit behind `digits_T`, [T, 2, 256], all ranks."""
        below = DIGIT * (LEVELS - 1 - level)
        next_TV = (self._order_TV >> below) & ((1 << DIGIT) - 1)
        is_here_TV = self._order_TV >> (below + DIGIT) == digits_T[:, None]
        both_T2V = torch.stack((is_here_TV.long(), self._mass_TV * is_here_TV), dim=1)
        counts_T2D = both_T2V.new_zeros(len(digits_T), 2, 1 << DIGIT)
        counts_T2D.scatter_add_(2, next_TV[:, None].expand(-1, 2, -1), both_T2V)
        return self._communicator.all_reduce(counts_T2D)

    def _down_to(self, last: Boundary, num_ties_T: Tensor) -> Tensor:
        """Larger values, and of those equal to the last one the first `num_ties_T` ids."""
        is_tie_TV = self._order_TV == last.digits_T[:, None]
        ties_NT = self._communicator.all_gather(is_tie_TV.sum(dim=1))
        mine_T = num_ties_T - ties_NT[: self._communicator.shard.rank].sum(dim=0)
        is_early_TV = is_tie_TV.cumsum(dim=1) <= mine_T[:, None]
        return (self._order_TV > last.digits_T[:, None]) | (is_tie_TV & is_early_TV)
