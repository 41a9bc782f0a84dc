"""Chance keyed by a request's seed and a position, for drafts that are drawn.

Three things are random at a position and must not share their noise: the target's draw, which has
the request's seed itself, the draft's draw, and the coins of verification. What is keyed by the
position alone is the same whatever runs beside, and of every position only one draw ever counts.

Letters: B sequences, N rows of a tree.
"""

import torch
from torch import Tensor

from aerie.kernels.gumbel import UINT32, philox_ref

DRAFT, COINS = 1, 2  # what a seed is derived for
COIN_BITS = 24  # a float32 holds so many below 1


def coins(seeds_B: Tensor, positions_BN: Tensor, ranks_N: Tensor) -> Tensor:
    """A uniform in [0, 1) for every node, float32: of its position and its rank among siblings."""
    own_B1 = derived_seeds(seeds_B, COINS)[:, None]
    zeros = torch.zeros_like(positions_BN)
    counter = [ranks_N.expand_as(positions_BN), positions_BN & UINT32, zeros, zeros]
    words_BN = philox_ref(counter, own_B1)[0]
    return (words_BN >> (32 - COIN_BITS)).float() * 2.0**-COIN_BITS


def derived_seeds(seeds_B: Tensor, use: int) -> Tensor:
    """Other seeds, int64, as good as independent of `seeds_B` and of those for another use."""
    zeros = torch.zeros_like(seeds_B)
    low, high, *_ = philox_ref([zeros, zeros, zeros + use, zeros + 1], seeds_B)
    return low | (high << 32)
