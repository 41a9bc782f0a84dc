"""What a drafter hands to verification: drafted tokens and how they hang together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.rejection import Drawn
from aerie.llama4.device_steps import chain_shape, device_shape
from aerie.llama4.step import DeviceTree, Tree

# Asked behind every level but the last, with the log-probabilities of the paths to its nodes
# [B, K]: is another level worth drafting? An answer reads the device, so a drafter may have none
# to ask.
GoesOn = Callable[[Tensor], bool]


@dataclass(frozen=True)
class DraftTree:
    """`tokens_BN` on the device, one per drafted node; row 0 of `shape` is the root before them.

    No node is deeper than `depth`. Siblings carry distinct tokens. A shape of [N] is that of all
    sequences. `scores_BN`, where the drafter gives them, are the log-probabilities of the paths to
    the nodes, as the draft sees them. `drawn` says from what, where nodes were drawn and must be
    verified by rejection.
    """

    tokens_BN: Tensor
    shape: DeviceTree
    depth: int
    scores_BN: Tensor | None = None
    drawn: Drawn | None = None

    @property
    def is_chain(self) -> bool:
        return self.shape.words_N is None


def chain(tokens_BN: Tensor, scores_BN: Tensor | None = None) -> DraftTree:
    """Every token is the child of the one before it; no tokens is plain decoding."""
    length = tokens_BN.shape[1]
    return DraftTree(tokens_BN, chain_shape(length + 1, tokens_BN.device), length, scores_BN)


def fixed_tree(
    tokens_BN: Tensor, parents: tuple[int, ...], scores_BN: Tensor | None = None
) -> DraftTree:
    """A shape that the host knows; `parents[0]`, the root's, is -1."""
    tree = Tree(parents)
    shape = device_shape(tree, tokens_BN.device)
    return DraftTree(tokens_BN, shape, max(tree.depths()), scores_BN)


def best_nodes(
    tokens_BM: Tensor,
    scores_BM: Tensor,
    parents_BM: Tensor,
    levels_BM: Tensor,
    count: int,
    depth: int,
) -> DraftTree:
    """The `count` best of a pool of M candidates as a tree, without a look at them (EAGLE-2).

    A candidate's parent stands before it (-1: the root) and scores no less, and of equals the
    earlier is kept: so with every node its ancestors are kept, and stand before it.
    """
    (sequences, candidates), device = tokens_BM.shape, tokens_BM.device
    order_BM = scores_BM.sort(dim=1, descending=True, stable=True).indices
    kept_BN = order_BM[:, :count].sort(dim=1).values
    numbers_N = torch.arange(1, kept_BN.shape[1] + 1, device=device)
    row_of = torch.zeros(sequences, candidates + 1, dtype=torch.int64, device=device)
    row_of.scatter_(1, kept_BN + 1, numbers_N.expand(sequences, -1))
    root_B1 = row_of[:, :1]
    parents_BN = torch.cat((root_B1, row_of.gather(1, parents_BM.gather(1, kept_BN) + 1)), dim=1)
    depths_BN = torch.cat((root_B1, levels_BM.gather(1, kept_BN)), dim=1)
    words_BN = ancestor_words(parents_BN, depth)
    parents_BN = torch.cat((root_B1 - 1, parents_BN[:, 1:]), dim=1)
    shape = DeviceTree(parents_BN, depths_BN, words_BN)
    return DraftTree(tokens_BM.gather(1, kept_BN), shape, depth, scores_BM.gather(1, kept_BN))


def best_part(tree: DraftTree, count: int, depth: int) -> DraftTree:
    """The `count` best nodes of every tree, none of them deeper than `depth`, by its scores."""
    scores_BN, shape = tree.scores_BN, tree.shape
    assert scores_BN is not None, "cut by scores, which this drafter does not give"
    if count == tree.tokens_BN.shape[1]:
        return tree
    if tree.is_chain:
        return chain(tree.tokens_BN[:, :count], scores_BN[:, :count])
    parents_BN = (shape.parents_N[..., 1:] - 1).expand(tree.tokens_BN.shape)
    levels_BN = shape.depths_N[..., 1:].expand(tree.tokens_BN.shape)
    return best_nodes(tree.tokens_BN, scores_BN, parents_BN, levels_BN, count, depth)


def ancestor_words(parents_BN: Tensor, depth: int) -> Tensor:
    """Bit j of word i: row j is row i or above it. The root is its own parent here."""
    rows = torch.arange(parents_BN.shape[1], device=parents_BN.device)
    own_BN = torch.ones_like(parents_BN) << rows
    words_BN = own_BN
    for _ in range(depth):
        words_BN = own_BN | words_BN.gather(1, parents_BN)
    return words_BN
