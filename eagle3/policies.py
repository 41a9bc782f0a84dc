"""What to draft each round: a chain, a tree of a fixed shape, or EAGLE-2's dynamic tree.

A policy says how deep and how wide it gets and builds the drafter that does it. The output is the
same whatever the policy; only the number of passes differs. By `verification` "rejection" drafts
are drawn, at the request's temperature, and verified by multi-round rejection (`rejection`): more
of them are accepted where the target is undecided, and the output has the same distribution, but
is no longer the very same as without a draft.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import ChainDrafter, Drafter
from aerie.eagle3.tree import GoesOn
from aerie.eagle3.tree_drafter import DynamicTreeDrafter, StaticTreeDrafter
from aerie.kernels.draft_vocab import MAX_K
from aerie.kernels.tree_rows import MAX_TREE_ROWS
from aerie.llama4.cache import PagedKVCache

MAX_SPECULATIVE_TOKENS = MAX_TREE_ROWS - 1  # the root is a row of the verified tree too


Verification = Literal["match", "rejection"]


@dataclass(frozen=True)
class Form:
    """Drafted nodes of every sequence, how deep they go, and whether they are a chain."""

    num_nodes: int
    depth: int
    is_chain: bool


class Policy(Protocol):
    """`depth` levels at most; `num_rows` rows at most stand uncommitted in either cache.

    `form` is that of all its trees, None where the host decides in every round. A drafter deepens
    as long as the confidence threshold and `goes_on` want it.
    """

    @property
    def depth(self) -> int: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def verification(self) -> Verification: ...

    @property
    def form(self) -> Form | None: ...

    def drafter(
        self,
        draft: Eagle3Llama4ForCausalLM,
        cache: PagedKVCache,
        tap_layers: tuple[int, ...],
        goes_on: GoesOn | None = None,
    ) -> Drafter: ...


@dataclass(frozen=True)
class Chain:
    """`num_speculative_tokens` tokens, each the likeliest behind the one before.

    Drafting stops where the probability of the whole chain falls under `confidence_threshold`.
    """

    num_speculative_tokens: int = 4
    confidence_threshold: float = 0.0
    verification: Verification = "match"

    def __post_init__(self) -> None:
        check_num_speculative_tokens(self.num_speculative_tokens)
        _check_threshold(self.confidence_threshold)
        _check_verification(self.verification)

    @property
    def depth(self) -> int:
        return self.num_speculative_tokens

    num_rows = depth

    @property
    def form(self) -> Form | None:
        count = self.num_speculative_tokens
        return Form(count, count, True) if self.confidence_threshold == 0 else None

    def drafter(self, draft, cache, tap_layers, goes_on=None) -> Drafter:
        stop = _both(self.confidence_threshold, goes_on)
        return ChainDrafter(self.num_speculative_tokens, draft, cache, tap_layers, stop)


@dataclass(frozen=True)
class StaticTree:
    """Paths of ranks: (0,) is the likeliest first token, (0, 1) the second likeliest behind it.

    Every beginning of a path must be a path too, and by "rejection" every lower rank: then a rank
    is the place in the order of drawing. Deepening stops where no node of a level has the
    probability `confidence_threshold`.
    """

    speculative_token_tree: Sequence[Sequence[int]]
    confidence_threshold: float = 0.0
    verification: Verification = "match"

    def __post_init__(self) -> None:
        name, paths = "speculative_token_tree", [tuple(p) for p in self.speculative_token_tree]
        if not 1 <= len(paths) <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"{name}: must hold 1..{MAX_SPECULATIVE_TOKENS} paths, got {len(paths)}"
            )
        for path in paths:
            is_rank = [type(rank) is int and 0 <= rank < MAX_K for rank in path]
            if not path or not all(is_rank):
                raise ValueError(f"{name}: a path is ranks 0..{MAX_K - 1}, got {list(path)}")
            if path[:-1] and path[:-1] not in paths:
                raise ValueError(f"{name}: {list(path)} lacks its beginning {list(path[:-1])}")
        if len(set(paths)) != len(paths):
            raise ValueError(f"{name}: a path is given twice")
        _check_threshold(self.confidence_threshold)
        _check_verification(self.verification)
        for *begin, rank in paths if self.verification == "rejection" else []:
            if rank > 0 and (*begin, rank - 1) not in paths:
                raise ValueError(
                    f"{name}: {[*begin, rank]} lacks {[*begin, rank - 1]}, which is drawn before it"
                )
        object.__setattr__(self, name, tuple(sorted(paths, key=lambda path: (len(path), path))))

    @property
    def depth(self) -> int:
        return max(map(len, self.speculative_token_tree))

    @property
    def num_rows(self) -> int:
        return len(self.speculative_token_tree)

    @property
    def form(self) -> Form | None:
        return Form(self.num_rows, self.depth, False) if self.confidence_threshold == 0 else None

    def drafter(self, draft, cache, tap_layers, goes_on=None) -> Drafter:
        width = 1 + max(rank for path in self.speculative_token_tree for rank in path)
        _check_vocabulary("speculative_token_tree", width, draft)
        paths = [tuple(path) for path in self.speculative_token_tree]
        stop = _both(self.confidence_threshold, goes_on)
        return StaticTreeDrafter(paths, draft, cache, tap_layers, stop)


@dataclass(frozen=True)
class DynamicTree:
    """The `num_speculative_tokens` likeliest nodes of `num_steps` levels, `eagle_topk` wide.

    Deepening stops where no node of a level has the probability `confidence_threshold`.
    """

    num_speculative_tokens: int = 8
    eagle_topk: int = 4
    num_steps: int = 3
    confidence_threshold: float = 0.0
    verification: Verification = field(default="match", init=False)  # its shape is by the scores

    def __post_init__(self) -> None:
        check_num_speculative_tokens(self.num_speculative_tokens)
        _check_threshold(self.confidence_threshold)
        k, steps = self.eagle_topk, self.num_steps
        for name, value, most in (("eagle_topk", k, MAX_K), ("num_steps", steps, 63)):
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name}: must be an integer 1..{most}, got {value!r}")
        if k * (steps - 1) > MAX_TREE_ROWS:
            raise ValueError(
                f"eagle_topk * (num_steps - 1): at most {MAX_TREE_ROWS} nodes can be expanded, "
                f"got {k} * {steps - 1}"
            )
        if self.num_speculative_tokens > k + (steps - 1) * k * k:
            raise ValueError(
                f"num_speculative_tokens: {steps} steps of topk {k} have "
                f"{k + (steps - 1) * k * k} candidates, got {self.num_speculative_tokens}"
            )

    @property
    def depth(self) -> int:
        return self.num_steps

    @property
    def num_rows(self) -> int:
        return max(self.num_speculative_tokens, self.eagle_topk * (self.num_steps - 1))

    @property
    def form(self) -> Form | None:
        count, is_fixed = self.num_speculative_tokens, self.confidence_threshold == 0
        return Form(count, self.num_steps, False) if is_fixed else None

    def drafter(self, draft, cache, tap_layers, goes_on=None) -> Drafter:
        _check_vocabulary("eagle_topk", self.eagle_topk, draft)
        sizes = self.num_speculative_tokens, self.num_steps, self.eagle_topk
        stop = _both(self.confidence_threshold, goes_on)
        return DynamicTreeDrafter(*sizes, draft, cache, tap_layers, stop)


def check_num_speculative_tokens(k: object) -> None:
    """Raises ValueError unless `k` is an integer within 1..MAX_SPECULATIVE_TOKENS."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_SPECULATIVE_TOKENS:
        raise ValueError(
            f"num_speculative_tokens: must be an integer 1..{MAX_SPECULATIVE_TOKENS}, got {k!r}"
        )


def _both(threshold: float, goes_on: GoesOn | None) -> GoesOn | None:
    """Whether a node has a probability of `threshold`, and what else is asked."""
    if threshold == 0:
        return goes_on

    least = math.log(threshold)

    def is_confident(scores_K: Tensor) -> bool:
        return scores_K.max().item() >= least and (goes_on is None or goes_on(scores_K))

    return is_confident


def _check_threshold(threshold: object) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ValueError(f"confidence_threshold: must be a number, got {threshold!r}")
    if not 0 <= threshold < 1:
        raise ValueError(f"confidence_threshold: must be in [0, 1), got {threshold!r}")


def _check_verification(verification: object) -> None:
    if verification not in get_args(Verification):
        raise ValueError(f"verification: must be match or rejection, got {verification!r}")


def _check_vocabulary(name: str, width: int, draft: Eagle3Llama4ForCausalLM) -> None:
    vocabulary = draft.config.draft_vocab_size
    if width > vocabulary:
        raise ValueError(f"{name}: {width} children, but the draft knows {vocabulary} tokens")
