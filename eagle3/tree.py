"""What a drafter hands to verification: drafted tokens and how they hang together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.llama4.cache import DeviceTree, Tree

# Asked behind every level but the last, with the log-probabilities of the paths to its nodes [K]:
# is another level worth drafting? An answer reads the device, so a drafter may have none to ask.
GoesOn = Callable[[Tensor], bool]


@dataclass(frozen=True)
class DraftTree:
    """`tokens_N` on the device, one per drafted node; row 0 of `shape` is the root before them.

    No node is deeper than `depth`. Siblings carry distinct tokens. `scores_N`, where the drafter
    gives them, are the log-probabilities of the paths to the nodes, as the draft sees them.
    """

    tokens_N: Tensor
    shape: Tree | DeviceTree
    depth: int
    scores_N: Tensor | None = None

    def parents(self) -> Tensor:
        """The parent row of every row, -1 for the root, where the tokens are."""
        if isinstance(self.shape, DeviceTree):
            return self.shape.parents_N
        return torch.tensor(self.shape.parents, device=self.tokens_N.device)

    def depths(self) -> Tensor:
        """The level of every node, 1 for the root's children, where the tokens are."""
        if isinstance(self.shape, DeviceTree):
            return self.shape.depths_N[1:]
        return torch.tensor(self.shape.depths()[1:], device=self.tokens_N.device)


def chain(tokens_N: Tensor, scores_N: Tensor | None = None) -> DraftTree:
    """Every token is the child of the one before it; no tokens is plain decoding."""
    return DraftTree(tokens_N, Tree(tuple(range(-1, len(tokens_N)))), len(tokens_N), scores_N)


def best_nodes(
    tokens_M: Tensor, scores_M: Tensor, parents_M: Tensor, levels_M: Tensor, count: int, depth: int
) -> DraftTree:
    """The `count` best of a pool of M candidates as a tree, without a look at them (EAGLE-2).

    A candidate's parent stands before it (-1: the root) and scores no less, and of equals the
    earlier is kept: so with every node its ancestors are kept, and stand before it.
    """
    kept_N = scores_M.sort(descending=True, stable=True).indices[:count].sort().values
    row_of = torch.zeros(len(tokens_M) + 1, dtype=torch.int64, device=tokens_M.device)
    row_of[kept_N + 1] = torch.arange(1, len(kept_N) + 1, device=tokens_M.device)
    parents_N = torch.cat((row_of[:1], row_of[parents_M[kept_N] + 1]))
    depths_N = torch.cat((row_of[:1], levels_M[kept_N]))
    words_N = ancestor_words(parents_N, depth)
    parents_N = torch.cat((parents_N[:1] - 1, parents_N[1:]))
    shape = DeviceTree(parents_N, depths_N, words_N)
    return DraftTree(tokens_M[kept_N], shape, depth, scores_M[kept_N])


def best_part(tree: DraftTree, count: int, depth: int) -> DraftTree:
    """The `count` best nodes of `tree`, none of them deeper than `depth`, by its scores."""
    assert tree.scores_N is not None, "cut by scores, which this drafter does not give"
    if count == len(tree.tokens_N):
        return tree
    if tree.depth == len(tree.tokens_N):
        return chain(tree.tokens_N[:count], tree.scores_N[:count])
    parents_N = tree.parents()[1:] - 1
    return best_nodes(tree.tokens_N, tree.scores_N, parents_N, tree.depths(), count, depth)


def ancestor_words(parents_N: Tensor, depth: int) -> Tensor:
    """Bit j of word i: row j is row i or above it. The root is its own parent here."""
    own_N = torch.ones_like(parents_N) << torch.arange(len(parents_N), device=parents_N.device)
    words_N = own_N
    for _ in range(depth):
        words_N = own_N | words_N[parents_N]
    return words_N
