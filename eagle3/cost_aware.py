"""Any policy with cost-aware width: each round drafts as deep and verifies as much as pays.

The inner policy's drafter is asked level by level whether the next one is worth its time, and its
tree is cut to the best nodes, of a size class (`width`). Both decisions read the draft's scores:
one number per level and one list per round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp

import torch
from torch import Tensor

from aerie.eagle3.batch import Committed
from aerie.eagle3.batch_costs import BatchCosts
from aerie.eagle3.drafter import Drafter, PromptRows
from aerie.eagle3.policies import Policy, Verification
from aerie.eagle3.tree import DraftTree, GoesOn, best_part
from aerie.eagle3.width import Experience, RoundCosts, worth_deepening, worth_verifying
from aerie.llama4.cache import PagedKVCache


@dataclass(frozen=True)
class CostAware:
    """`policy`, as wide as `costs` make worth while (`cost_measurement` measures them): one table
    for rows of any number of sequences, or a table for each number (`BatchCosts`)."""

    policy: Policy
    costs: RoundCosts | BatchCosts
    verification: Verification = field(default="match", init=False)
    form: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.policy.verification == "rejection":
            raise ValueError(
                "cost_aware_width: leaves out nodes by their own probability, which rejection does "
                "not allow; take verification 'match'"
            )

    @property
    def depth(self) -> int:
        return self.policy.depth

    @property
    def num_rows(self) -> int:
        return self.policy.num_rows

    def drafter(self, draft, cache, tap_layers, goes_on=None) -> Drafter:
        return CostAwareDrafter(
            lambda stop: self.policy.drafter(draft, cache, tap_layers, stop),
            self.costs,
            self.depth,
            self.num_rows,
            goes_on,
        )


@dataclass(frozen=True)
class _Round:
    """One that is under way: behind which lengths, and the path probabilities of its nodes."""

    lengths: list[int]
    verified: list[float]
    best_of_levels: list[float]


class CostAwareDrafter:
    """Drafts for the sequences of a batch, equally many nodes for each; learns from the committed
    rows it is told of, and by itself for every size of batch."""

    def __init__(
        self,
        build,
        costs: RoundCosts | BatchCosts,
        depth: int,
        num_rows: int,
        goes_on: GoesOn | None = None,
    ) -> None:
        """`build` makes the inner drafter of a `GoesOn`, of `depth` levels and `num_rows` nodes."""
        self.inner: Drafter = build(self._goes_on)
        self.tap_layers, self._all_costs = self.inner.tap_layers, costs
        self.depth, self.num_rows = depth, num_rows
        alone = costs.for_rounds(1, 1 + num_rows)
        assert alone is not None, "every table is of one sequence too"
        self.costs, self.experience = alone, Experience(alone)
        self._also = goes_on
        self._experiences = {1: self.experience}
        self._levels: list[list[float]] = []  # path probabilities, by drafted level
        self._last: _Round | None = None

    @property
    def cache(self) -> PagedKVCache | None:
        return self.inner.cache

    def prefill(self, prompt: PromptRows, taps_TD: Sequence[Tensor]) -> None:
        self.inner.prefill(prompt, taps_TD)

    def propose(self, committed: Committed) -> DraftTree:
        """Nothing where not even one node is worth verifying.

        A batch whose passes the table of costs does not reach is drafted for in full.
        """
        sequences = len(committed.lengths_B)
        self._learn(committed)
        costs = self._all_costs.for_rounds(sequences, 1 + self.num_rows)
        self._is_covered = costs is not None
        if costs is not None:
            known = self._experiences
            self.costs = costs
            self.experience = known.setdefault(sequences, Experience(costs, sequences))
        self._levels, self._num_sequences = [], sequences
        tree = self.inner.propose(committed)
        if tree.tokens_BN.shape[1] == 0 or not self._is_covered:
            return tree
        assert tree.scores_BN is not None
        scores_BN = tree.scores_BN.nan_to_num(-torch.inf)
        levels_BN = tree.shape.depths_N[..., 1:].expand(sequences, -1)
        read = torch.stack((scores_BN.double(), levels_BN.double()), dim=2).tolist()
        # best first, stably, as the cut sorts them
        trees = [sorted(nodes, key=lambda node: -node[0]) for nodes in read]
        gains = [self.experience.gain(exp(score)) for nodes in trees for score, _ in nodes]
        total = worth_verifying(
            sorted(gains, reverse=True), self.costs, self.experience.rate, sequences
        )
        count = -(-total // sequences)
        kept = [node for nodes in trees for node in nodes[:count]]
        self._levels = [
            [exp(score) for nodes in trees for score, level in nodes if level == wanted]
            for wanted in range(1, tree.depth + 1)
        ]
        best = [max(level, default=0.0) for level in self._levels]
        verified = [exp(score) for score, _ in kept]
        self._last = _Round(committed.lengths_B.tolist(), verified, best)
        depth = int(max((level for _, level in kept), default=0))
        return best_part(replace(tree, scores_BN=scores_BN), count, depth)

    def _learn(self, committed: Committed) -> None:
        """From the last round, if it was these sequences'."""
        last, self._last = self._last, None
        if last is not None and committed.starts_B.tolist() == last.lengths:
            accepted = int(committed.counts_B.sum()) - len(last.lengths)
            self.experience.observe(last.verified, last.best_of_levels, accepted)

    def _goes_on(self, scores_BK: Tensor) -> bool:
        experience = self.experience
        self._levels.append(scores_BK.flatten().exp().nan_to_num(0.0).tolist())
        gains = [[experience.gain(p) for p in level] for level in self._levels]
        is_worth = not self._is_covered or worth_deepening(
            [gain for level in gains for gain in level],
            gains[-1],
            self.depth - len(gains),
            experience.fall,
            self.costs,
            experience.rate,
            self._num_sequences,
        )
        return is_worth and (self._also is None or self._also(scores_BK))
