"""Drafting trees: a fixed shape, or the shape the draft's own confidence gives (EAGLE-2).

Level by level the draft runs the nodes whose children are wanted, in its own cache, as a tree step:
every node sees the committed prefix, its ancestors and itself, at the position of its depth. The
nodes of earlier levels run again beside the new ones: a row costs next to nothing where the weights
are what is read. None of these keys and values is committed.

EAGLE-2 (arXiv 2406.16858): a node's score is the log-probability of its path. The `topk` best of a
level are expanded by their `topk` likeliest children; of all candidates the best become the tree.
Everything stays on the device. Letters: B sequences, F rows of the running step of each, K nodes of
a level, A children of a node.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aerie.eagle3.batch import Committed
from aerie.eagle3.draft import DraftOutput
from aerie.eagle3.drafter import CachedDrafter
from aerie.eagle3.tree import DraftTree, best_nodes, fixed_tree
from aerie.llama4.device_steps import counting, device_step
from aerie.llama4.step import DeviceTree


@dataclass(frozen=True)
class Frontier:
    """Rows to run: earlier levels, then the nodes to expand next. `shape` [B, F] is their forest.

    `lengths_B` rows of every sequence stand before them in the draft's cache.
    """

    lengths_B: Tensor
    tokens_BF: Tensor
    hidden_BFD: Tensor
    shape: DeviceTree

    @classmethod
    def empty(cls, committed: Committed, hidden_BD: Tensor) -> "Frontier":
        none_B0 = committed.next_ids_BP[:, :0]
        forest = DeviceTree(none_B0, none_B0, none_B0)
        return cls(committed.lengths_B, none_B0, hidden_BD[:, None][:, :0], forest)

    def with_level(self, tokens_BK: Tensor, hidden_BKD: Tensor, parents_BK: Tensor) -> "Frontier":
        """One level more, whose parents are rows of this frontier (-1: none)."""
        old, first = self.shape, self.tokens_BF.shape[1]
        rows_K = counting(first + tokens_BK.shape[1], tokens_BK.device)[first:]
        words_BK = torch.ones_like(tokens_BK) << rows_K
        depths_BK = torch.zeros_like(tokens_BK)
        assert old.words_N is not None
        if first > 0:
            words_BK = words_BK | old.words_N.gather(1, parents_BK)
            depths_BK = old.depths_N.gather(1, parents_BK) + 1
        shape = DeviceTree(
            torch.cat((old.parents_N, parents_BK), dim=1),
            torch.cat((old.depths_N, depths_BK), dim=1),
            torch.cat((old.words_N, words_BK), dim=1),
        )
        return Frontier(
            self.lengths_B,
            torch.cat((self.tokens_BF, tokens_BK), dim=1),
            torch.cat((self.hidden_BFD, hidden_BKD), dim=1),
            shape,
        )


class TreeDrafter(CachedDrafter):
    """What both shapes share: running a frontier, and when to stop."""

    def _is_last(self, level: int, num_levels: int, scores_BK: Tensor) -> bool:
        return level == num_levels or (self.goes_on is not None and not self.goes_on(scores_BK))

    def _run(self, frontier: Frontier, last: int) -> DraftOutput:
        """States [B * last, D] of the last rows of every sequence."""
        sequences, rows = frontier.tokens_BF.shape
        step = device_step(self.cache, frontier.lengths_B, frontier.shape)
        output = self.draft(frontier.tokens_BF.reshape(-1), frontier.hidden_BFD.flatten(0, 1), step)

        def of_last(x_TD: Tensor) -> Tensor:
            return x_TD.view(sequences, rows, -1)[:, rows - last :].flatten(0, 1)

        return DraftOutput(of_last(output.post_norm_TD), of_last(output.next_hidden_TD))


class DynamicTreeDrafter(TreeDrafter):
    """EAGLE-2's trees of `num_nodes` nodes and `num_levels` levels, `topk` children to a node."""

    def __init__(self, num_nodes: int, num_levels: int, topk: int, *draft_and_cache) -> None:
        super().__init__(*draft_and_cache)
        self.num_nodes, self.num_levels, self.topk = num_nodes, num_levels, topk

    def propose(self, committed: Committed) -> DraftTree:
        output = self._catch_up(committed)
        frontier = Frontier.empty(committed, output.next_hidden_TD)
        k, sequences = self.topk, len(committed.lengths_B)
        expanded_BK = torch.full_like(committed.next_ids_BP[:, :1], -1)
        path_score_BK = torch.zeros_like(expanded_BK, dtype=torch.float32)
        tokens, scores, parents, sizes = [], [], [], []
        for level in range(1, self.num_levels + 1):
            top = self.draft.top_tokens(output.post_norm_TD, k)
            logprobs_BKA = top.logprobs_TA.clamp(max=0).nan_to_num(-torch.inf)
            score_BKA = path_score_BK[:, :, None] + logprobs_BKA.view(sequences, -1, k)
            tokens.append(top.ids_TA.view(sequences, -1))
            scores.append(score_BKA.flatten(1))
            parents.append(expanded_BK.repeat_interleave(k, dim=1))
            sizes.append(tokens[-1].shape[1])
            if self._is_last(level, self.num_levels, scores[-1]):
                break
            best_BK = scores[-1].sort(dim=1, descending=True, stable=True).indices[:, :k]
            frontier = frontier.with_level(
                tokens[-1].gather(1, best_BK),
                _picked(output.next_hidden_TD, best_BK // k),
                self._rows(frontier, best_BK // k, expanded_BK.shape[1]),
            )
            expanded_BK = best_BK + sum(sizes[:-1])
            path_score_BK = scores[-1].gather(1, best_BK)
            output = self._run(frontier, best_BK.shape[1])
        tokens_BM, scores_BM, parents_BM = (torch.cat(x, dim=1) for x in (tokens, scores, parents))
        levels_BM = _numbers_of(tuple(sizes), tokens_BM.device).expand(sequences, -1)
        count, depth = self.num_nodes, len(sizes)
        return best_nodes(tokens_BM, scores_BM, parents_BM, levels_BM, count, depth)

    @staticmethod
    def _rows(frontier: Frontier, parents_BK: Tensor, num_expanded: int) -> Tensor:
        """Of parents among the nodes expanded last; none before the first level."""
        rows = frontier.tokens_BF.shape[1]
        return parents_BK + (rows - num_expanded) if rows else torch.full_like(parents_BK, -1)


def _numbers_of(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """1 as often as `sizes[0]` says, 2 as often as `sizes[1]` says, and so on."""
    parts = [torch.full((size,), i, device=device) for i, size in enumerate(sizes, start=1)]
    return torch.cat(parts)


def _picked(x_TD: Tensor, parents_BK: Tensor) -> Tensor:
    """[B, K, D], rows of `x_TD` [B * E, D] by their number within their sequence."""
    sequences = len(parents_BK)
    x_BED = x_TD.view(sequences, -1, x_TD.shape[-1])
    if sequences == 1:
        return x_BED[:, parents_BK[0]]
    return x_BED.gather(1, parents_BK[:, :, None].expand(-1, -1, x_TD.shape[-1]))


@dataclass(frozen=True)
class _Level:
    """One level of a fixed shape: parents and ranks of its nodes; which of them have children."""

    parents: tuple[int, ...]  # rows of the tree whose children the level holds
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
            above = tuple(rows[path] for path in expanded)
            self._levels.append(_Level(above, parent_K, rank_K, max(ranks) + 1, expanded_K))
            expanded = [nodes[i] for i in numbers]

    def propose(self, committed: Committed) -> DraftTree:
        output = self._catch_up(committed)
        frontier = Frontier.empty(committed, output.next_hidden_TD)
        sequences, score_BK = (
            len(committed.lengths_B),
            torch.zeros_like(committed.next_ids_BP[:, :1], dtype=torch.float32),
        )
        tokens, scores = [], []
        for number, level in enumerate(self._levels, start=1):
            top = self._siblings(
                output.post_norm_TD, committed.lengths_B, number, level.parents, level.width
            )
            ids_BKA = top.ids_TA.view(sequences, -1, level.width)
            logprobs_BKA = top.logprobs_TA.view(ids_BKA.shape)
            tokens.append(ids_BKA[:, level.parent_K, level.rank_K])
            score_BK = score_BK[:, level.parent_K] + logprobs_BKA[:, level.parent_K, level.rank_K]
            scores.append(score_BK)
            if self._is_last(number, len(self._levels), score_BK):
                break
            parent_K = level.parent_K[level.expanded_K]
            num_rows, num_expanded = frontier.tokens_BF.shape[1], ids_BKA.shape[1]
            rows_K = parent_K + (num_rows - num_expanded) if num_rows else parent_K - parent_K - 1
            frontier = frontier.with_level(
                tokens[-1][:, level.expanded_K],
                output.next_hidden_TD.view(sequences, num_expanded, -1)[:, parent_K],
                rows_K.expand(sequences, -1),
            )
            score_BK = score_BK[:, level.expanded_K]
            output = self._run(frontier, len(parent_K))
        tokens_BN = torch.cat(tokens, dim=1)
        parents = tuple(self._parents[: tokens_BN.shape[1] + 1])
        tree = fixed_tree(tokens_BN, parents, torch.cat(scores, dim=1))
        return tree if self.draws is None else replace(tree, drawn=self.draws.drawn(parents))
