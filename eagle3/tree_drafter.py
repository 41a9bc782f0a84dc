"""Drafting trees: a fixed shape, or the shape the draft's own confidence gives (EAGLE-2).

Level by level the draft runs the nodes whose children are wanted, in its own cache, as a tree step:
every node sees the committed prefix, its ancestors and itself, at the position of its depth. The
nodes of earlier levels run again beside the new ones: a row costs next to nothing where the weights
are what is read. None of these keys and values is committed.

EAGLE-2 (arXiv 2406.16858): a node's score is the log-probability of its path. The `topk` best of a
level are expanded by their `topk` likeliest children; of all candidates the best become the tree.
Everything stays on the device. Letters: F rows of the running step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.draft import DraftOutput, Eagle3Llama4ForCausalLM
from aerie.eagle3.tree import DraftTree, GoesOn, best_nodes, chain
from aerie.llama4.cache import DeviceTree, Tree
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_scales import KVCacheDtype


@dataclass(frozen=True)
class Frontier:
    """Rows to run: earlier levels, then the nodes to expand next. `shape` is their forest."""

    tokens_F: Tensor
    hidden_FD: Tensor
    shape: DeviceTree

    def with_level(self, tokens_K: Tensor, hidden_KD: Tensor, parents_K: Tensor) -> "Frontier":
        """One level more, whose parents are rows of this frontier (-1: none)."""
        old, first = self.shape, len(self.tokens_F)
        own_K = torch.ones_like(tokens_K) << torch.arange(
            first, first + len(tokens_K), device=tokens_K.device
        )
        has_parent = first > 0
        words_K = own_K | old.words_N[parents_K] if has_parent else own_K
        depths_K = old.depths_N[parents_K] + 1 if has_parent else torch.zeros_like(tokens_K)
        shape = DeviceTree(
            torch.cat((old.parents_N, parents_K)),
            torch.cat((old.depths_N, depths_K)),
            torch.cat((old.words_N, words_K)),
        )
        return Frontier(
            torch.cat((self.tokens_F, tokens_K)), torch.cat((self.hidden_FD, hidden_KD)), shape
        )


class TreeDrafter:
    """What both shapes share: the draft, its cache, and the state behind the committed rows."""

    def __init__(
        self,
        draft: Eagle3Llama4ForCausalLM,
        max_length: int,
        tap_layers: tuple[int, ...],
        kv_cache_dtype: KVCacheDtype,
        goes_on: GoesOn | None = None,
    ) -> None:
        self.draft = draft
        self.goes_on = goes_on
        self.tap_layers = tap_layers
        self.cache = draft.allocate_cache(max_length, kv_cache_dtype=kv_cache_dtype)
        self._last: DraftOutput | None = None

    def observe(
        self,
        aux_hidden_states: Sequence[Tensor],
        next_ids_T: Tensor,
        images: ImageFeatures | None = None,
    ) -> None:
        """As `ChainDrafter.observe`."""
        hidden_TD = self.draft.combine_hidden_states(aux_hidden_states)
        embeds_TD = self.draft.merged_embeddings(next_ids_T, self.cache.lengths[0], images)
        step = self.cache.causal_step(len(next_ids_T))
        output = self.draft(next_ids_T, hidden_TD, step, embeds_TD)
        self.cache.commit(0, range(len(next_ids_T)))
        self._last = DraftOutput(output.post_norm_TD[-1:], output.next_hidden_TD[-1:])

    def _is_last(self, level: int, num_levels: int, scores_K: Tensor) -> bool:
        return level == num_levels or (self.goes_on is not None and not self.goes_on(scores_K))

    def _begin(self) -> tuple[DraftOutput, Frontier]:
        assert self._last is not None, "observe comes first"
        hidden_0D = self._last.next_hidden_TD[:0]
        nothing = torch.empty(0, dtype=torch.int64, device=hidden_0D.device)
        return self._last, Frontier(nothing, hidden_0D, DeviceTree(nothing, nothing, nothing))

    def _run(self, frontier: Frontier) -> DraftOutput:
        step = self.cache.tree_step(frontier.shape)
        return self.draft(frontier.tokens_F, frontier.hidden_FD, step)


class DynamicTreeDrafter(TreeDrafter):
    """EAGLE-2's trees of `num_nodes` nodes, `topk` children to an expanded node."""

    def __init__(self, num_nodes: int, topk: int, *draft_and_cache) -> None:
        super().__init__(*draft_and_cache)
        self.num_nodes, self.topk = num_nodes, topk

    def propose(self, num_tokens: int) -> DraftTree:
        """A tree of at most `num_tokens` levels."""
        output, frontier = self._begin()
        if num_tokens == 0:
            return chain(frontier.tokens_F)
        k, device = self.topk, frontier.tokens_F.device
        expanded_K, rows_K = torch.full((1,), -1, device=device), None
        path_score_K = torch.zeros(1, device=device)
        tokens, scores, parents, sizes = [], [], [], []
        for level in range(1, num_tokens + 1):
            top = self.draft.top_tokens(output.post_norm_TD[-len(expanded_K) :], k)
            score = path_score_K[:, None] + top.logprobs_TA.clamp(max=0).nan_to_num(-torch.inf)
            tokens.append(top.ids_TA.flatten())
            scores.append(score.flatten())
            parents.append(expanded_K.repeat_interleave(k))
            sizes.append(len(tokens[-1]))
            if self._is_last(level, num_tokens, scores[-1]):
                break
            best_K = scores[-1].sort(descending=True, stable=True).indices[:k]
            hidden_KD = output.next_hidden_TD[-len(expanded_K) :][best_K // k]
            rows_K = best_K // k + len(frontier.tokens_F) - len(expanded_K)
            frontier = frontier.with_level(
                tokens[-1][best_K], hidden_KD, rows_K if level > 1 else torch.full_like(best_K, -1)
            )
            expanded_K, path_score_K = best_K + sum(sizes[:-1]), scores[-1][best_K]
            output = self._run(frontier)
        levels = [torch.full((size,), i, device=device) for i, size in enumerate(sizes, start=1)]
        pool = (torch.cat(part) for part in (tokens, scores, parents, levels))
        return best_nodes(*pool, count=self.num_nodes, depth=len(sizes))


@dataclass(frozen=True)
class _Level:
    """One level of a fixed shape: parents and ranks of its nodes; which of them have children."""

    parent_K: Tensor  # among the expanded nodes of the level above
    rank_K: Tensor
    width: int
    expanded_K: Tensor  # among this level's nodes


class StaticTreeDrafter(TreeDrafter):
    """Trees of one shape: `paths` of ranks, each with its beginnings, shorter before longer."""

    def __init__(self, paths: Sequence[tuple[int, ...]], *draft_and_cache) -> None:
        super().__init__(*draft_and_cache)
        device = self.draft.lm_head.weight.device
        rows = {path: row for row, path in enumerate([(), *paths])}
        self._parents = [-1, *(rows[path[:-1]] for path in paths)]
        with_children = {path[:-1] for path in paths}
        expanded: list[tuple[int, ...]] = [()]
        self._levels: list[_Level] = []
        for depth in range(1, max(map(len, paths)) + 1):
            nodes = [path for path in paths if len(path) == depth]
            numbers = [i for i, path in enumerate(nodes) if path in with_children]
            ranks = [path[-1] for path in nodes]
            columns = ([expanded.index(path[:-1]) for path in nodes], ranks, numbers)
            parent_K, rank_K, expanded_K = (torch.tensor(c, device=device).long() for c in columns)
            self._levels.append(_Level(parent_K, rank_K, max(ranks) + 1, expanded_K))
            expanded = [nodes[i] for i in numbers]

    def propose(self, num_tokens: int) -> DraftTree:
        """The shape's first `num_tokens` levels."""
        output, frontier = self._begin()
        tokens, score_K = [frontier.tokens_F], torch.zeros(1, device=frontier.tokens_F.device)
        scores = [score_K[:0]]
        num_expanded, depth = 1, 0
        for level in self._levels[:num_tokens]:
            depth += 1
            top = self.draft.top_tokens(output.post_norm_TD[-num_expanded:], level.width)
            tokens.append(top.ids_TA[level.parent_K, level.rank_K])
            score_K = score_K[level.parent_K] + top.logprobs_TA[level.parent_K, level.rank_K]
            scores.append(score_K)
            if self._is_last(depth, min(num_tokens, len(self._levels)), score_K):
                break
            parent_K = level.parent_K[level.expanded_K]
            rows_K = parent_K + len(frontier.tokens_F) - num_expanded
            hidden_KD = output.next_hidden_TD[-num_expanded:][parent_K]
            frontier = frontier.with_level(
                tokens[-1][level.expanded_K],
                hidden_KD,
                rows_K if depth > 1 else torch.full_like(rows_K, -1),
            )
            num_expanded, score_K = len(parent_K), score_K[level.expanded_K]
            output = self._run(frontier)
        tokens_N = torch.cat(tokens)
        shape = Tree(tuple(self._parents[: len(tokens_N) + 1]))
        return DraftTree(tokens_N, shape, depth, torch.cat(scores))
