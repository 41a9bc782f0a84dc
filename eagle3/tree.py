"""What a drafter hands to verification: drafted tokens and how they hang together."""

from dataclasses import dataclass

from torch import Tensor

from aerie.llama4.cache import Tree


@dataclass(frozen=True)
class DraftTree:
    """`tokens_N` on the device, one per drafted node; row 0 of `shape` is the root before them."""

    tokens_N: Tensor
    shape: Tree


def chain(tokens_N: Tensor) -> DraftTree:
    """Every token is the child of the one before it; no tokens is plain decoding."""
    return DraftTree(tokens_N, Tree(tuple(range(-1, len(tokens_N)))))
