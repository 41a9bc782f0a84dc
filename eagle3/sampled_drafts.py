"""Drafts that are drawn instead of chosen, and the chance of their verification (`rejection`).

    siblings behind a row:  the k largest of  log q + Gumbel noise,  largest first

are a draw without replacement from q in that order (Kool et al. 2019), of which one is a draw from
q. q = softmax(draft logits / temperature) in float32, and it is the very q that verification is
told. Three things are random at a position and must not share their noise: the target's draw, the
draft's, and the coins. Each has a seed of its own, derived from the request's.

Letters: R rows to draw behind, U draft vocabulary, B sequences, N rows of a tree.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.kernels.gumbel import UINT32, gumbel_ref, philox_ref

DRAFT, COINS = 1, 2  # what a seed is derived for
COIN_BITS = 24  # a float32 holds so many below 1


@dataclass(frozen=True)
class Siblings:
    """`ids_RK` in the draft's vocabulary, in drawn order, and the q they were drawn from."""

    ids_RK: Tensor
    logprobs_RK: Tensor
    probs_RU: Tensor


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
    ids_RK = score_RU.topk(count, dim=-1).indices
    return Siblings(ids_RK, log_q_RU.gather(1, ids_RK), log_q_RU.exp())


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
