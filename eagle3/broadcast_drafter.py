"""A drafter on rank 0 and its followers: what rank 0 drafted, every rank verifies.

One broadcast a round of the drafted tokens, and for trees of their parents, depths and ancestors.
Where the policy's trees always have one form, the followers know it and wait for nothing on the
host; otherwise (thresholds, cost-aware width) rank 0 says the form of every tree first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from aerie.eagle3.batch import Committed
from aerie.eagle3.drafter import Drafter, PromptRows
from aerie.eagle3.policies import Form, Policy
from aerie.eagle3.tree import DraftTree, chain
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.communicator import Communicator
from aerie.llama4.step import DeviceTree


class LeadingDrafter:
    """Rank 0's: drafts, and tells the others."""

    def __init__(self, inner: Drafter, policy: Policy, communicator: Communicator) -> None:
        self.inner, self.tap_layers = inner, inner.tap_layers
        self._form, self._communicator = policy.form, communicator

    @property
    def cache(self) -> PagedKVCache | None:
        return self.inner.cache

    def prefill(self, prompt: PromptRows, taps_TD: Sequence[Tensor]) -> None:
        self.inner.prefill(prompt, taps_TD)

    def propose(self, committed: Committed) -> DraftTree:
        tree = self.inner.propose(committed)
        form = _form_of(tree)
        if self._form is None:
            self._communicator.from_first(form)
        else:
            assert form == self._form, "the followers take it for granted"
        if form.num_nodes > 0:
            self._communicator.broadcast(_packed(tree))
        return tree


class FollowingDrafter:
    """The other ranks': needs no taps, holds nothing, and takes what rank 0 drafted."""

    tap_layers: tuple[int, ...] = ()
    cache = None

    def __init__(self, policy: Policy, communicator: Communicator) -> None:
        self._form, self._communicator = policy.form, communicator

    def prefill(self, prompt: PromptRows, taps_TD: Sequence[Tensor]) -> None:
        """Rank 0's draft follows the prompt."""

    def propose(self, committed: Committed) -> DraftTree:
        form = self._form
        if form is None:
            form = self._communicator.from_first(Form(0, 0, True))
        sequences = len(committed.lengths_B)
        packed = committed.lengths_B.new_empty(sequences, _num_columns(form))
        if form.num_nodes > 0:
            self._communicator.broadcast(packed)
        if form.is_chain:
            return chain(packed)
        sizes = [form.num_nodes, *[form.num_nodes + 1] * 3]
        tokens_BN, *shape = (part.contiguous() for part in packed.split(sizes, dim=1))
        return DraftTree(tokens_BN, DeviceTree(*shape), form.depth)


def _num_columns(form: Form) -> int:
    """Of what is broadcast: tokens; of trees three numbers of every row too, the root's too."""
    return form.num_nodes if form.is_chain else form.num_nodes + 3 * (form.num_nodes + 1)


def _form_of(tree: DraftTree) -> Form:
    """A tree of nothing but the root is a chain as well."""
    num_nodes = tree.tokens_BN.shape[1]
    return Form(num_nodes, tree.depth, tree.is_chain or num_nodes == 0)


def _packed(tree: DraftTree) -> Tensor:
    """Tokens, parents, depths and ancestors side by side, int64 [B, ...]."""
    if tree.is_chain:
        return tree.tokens_BN.contiguous()
    shape, sequences = tree.shape, len(tree.tokens_BN)
    assert shape.words_N is not None
    numbers = (shape.parents_N, shape.depths_N, shape.words_N)
    return torch.cat((tree.tokens_BN, *(x.expand(sequences, -1) for x in numbers)), dim=1)
