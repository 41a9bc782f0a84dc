"""Any policy with cost-aware width: each round drafts as deep and verifies as much as pays.

The inner policy's drafter is asked level by level whether the next one is worth its time, and its
tree is cut to the best nodes, of a size class (`width`). Both decisions read the draft's scores:
one number per level and one list per round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp

import torch
from torch import Tensor

from aerie.eagle3.drafter import Drafter
from aerie.eagle3.policies import Policy
from aerie.eagle3.tree import DraftTree, GoesOn, best_part
from aerie.eagle3.width import Experience, RoundCosts, worth_deepening, worth_verifying
from aerie.llama4.image_features import ImageFeatures


@dataclass(frozen=True)
class CostAware:
    """`policy`, as wide as `costs` make worth while (`cost_measurement` measures them)."""

    policy: Policy
    costs: RoundCosts

    @property
    def depth(self) -> int:
        return self.policy.depth

    @property
    def num_rows(self) -> int:
        return self.policy.num_rows

    def drafter(self, draft, max_length, tap_layers, kv_cache_dtype, goes_on=None) -> Drafter:
        return CostAwareDrafter(
            lambda stop: self.policy.drafter(draft, max_length, tap_layers, kv_cache_dtype, stop),
            self.costs,
            goes_on,
        )


class CostAwareDrafter:
    """Drafts for one sequence; learns from the committed rows it is told of."""

    def __init__(self, build, costs: RoundCosts, goes_on: GoesOn | None = None) -> None:
        """`build` makes the inner drafter of a `GoesOn`."""
        self.inner: Drafter = build(self._goes_on)
        self.tap_layers = self.inner.tap_layers
        self.costs, self.experience = costs, Experience(costs)
        self._also = goes_on
        self._levels: list[list[float]] = []  # path probabilities, by drafted level
        self._levels_wanted = 0
        self._verified: list[float] | None = None  # of the round that is under way

    def observe(
        self,
        aux_hidden_states: Sequence[Tensor],
        next_ids_T: Tensor,
        images: ImageFeatures | None = None,
    ) -> None:
        if self._verified is not None:
            best = [max(level, default=0.0) for level in self._levels]
            self.experience.observe(self._verified, best, len(next_ids_T) - 1)
            self._verified = None
        self.inner.observe(aux_hidden_states, next_ids_T, images)

    def propose(self, num_tokens: int) -> DraftTree:
        """At most `num_tokens` levels; nothing where not even one node is worth verifying."""
        self._levels, self._levels_wanted = [], num_tokens
        tree = self.inner.propose(num_tokens)
        if len(tree.tokens_N) == 0:
            self._verified = []
            return tree
        assert tree.scores_N is not None
        scores_N = tree.scores_N.nan_to_num(-torch.inf)
        read = torch.stack((scores_N.double(), tree.depths().double())).tolist()
        nodes = sorted(zip(*read, strict=True), key=lambda node: -node[0])  # stable, as the cut
        probabilities = [exp(score) for score, _ in nodes]
        gains = [self.experience.gain(p) for p in probabilities]
        count = worth_verifying(gains, self.costs, self.experience.rate)
        self._verified = probabilities[:count]
        self._levels = [
            [exp(score) for score, level in nodes if level == wanted]
            for wanted in range(1, tree.depth + 1)
        ]
        depth = int(max((level for _, level in nodes[:count]), default=0))
        return best_part(replace(tree, scores_N=scores_N), count, depth)

    def _goes_on(self, scores_K: Tensor) -> bool:
        experience = self.experience
        self._levels.append(scores_K.exp().nan_to_num(0.0).tolist())
        gains = [[experience.gain(p) for p in level] for level in self._levels]
        is_worth = worth_deepening(
            [gain for level in gains for gain in level],
            gains[-1],
            self._levels_wanted - len(gains),
            experience.fall,
            self.costs,
            experience.rate,
        )
        return is_worth and (self._also is None or self._also(scores_K))
