"""Every speculation policy writes the ids of plain decoding, and drafts what it says it drafts.

Regimes: chains, static and dynamic trees of random shape, with and without a confidence stop and
cost-aware width, greedy and sampled, around chunk edges and up to the end of the context; trees
that hold the truth on some branch are accepted to their depth; the dynamic tree against EAGLE-2
written down node by node, each path run alone; shapes and keys that must be refused.
"""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from aerie.eagle3.batch import Committed
from aerie.eagle3.cost_aware import CostAware
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.generate import generate
from aerie.eagle3.policies import Chain, DynamicTree, Form, Policy, StaticTree
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.eagle3.tree import DraftTree, fixed_tree
from aerie.eagle3.width import RoundCosts
from aerie.llama4.device_steps import chain_shape, device_step
from aerie.llama4.step import Tree
from tests.test_lossless import (
    CHUNK,
    CONTEXT,
    VOCAB,
    ScriptedDrafter,
    random_draft,
    random_prompt,
    random_target,
)

BINARY = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 2), (1, 0, 1)]


def random_policy(choose: random.Random) -> Policy:
    """Every third one cost-aware, by a table that wants few nodes, many, or sizes in between."""
    policy = random_fixed_policy(choose)
    if choose.random() < 2 / 3:
        return policy
    slope, sizes = choose.choice([0.01, 0.2, 1.0]), {1, *choose.sample(range(2, 64), 20), 64}
    costs = RoundCosts({rows: 1 + slope * rows for rows in sizes}, choose.choice([0.0, 0.2]))
    return CostAware(policy, costs)


def random_fixed_policy(choose: random.Random) -> Policy:
    threshold = choose.choice([0.0, 0.0, 0.05, 0.3])
    kind = choose.choice([Chain, StaticTree, DynamicTree])
    if kind is Chain:
        return Chain(choose.randint(1, 8), threshold)
    if kind is DynamicTree:
        k, steps = choose.randint(1, 5), choose.randint(1, 4)
        return DynamicTree(choose.randint(1, min(40, k + (steps - 1) * k * k)), k, steps, threshold)
    paths: set[tuple[int, ...]] = {(0,)}
    for _ in range(choose.randint(0, 12)):
        paths.add((*choose.choice([(), *paths]), choose.randrange(4)))
    return StaticTree(list(paths), threshold)


@pytest.mark.parametrize("block", range(6))
def test_random_policies(block):
    """6 x 30 random policies, prompts and samplers."""
    choose = random.Random(block)
    target = random_target(block, num_hidden_layers=4)
    draft = random_draft(block, target)
    for number in range(30):
        prompt, policy = random_prompt(30 * block + number), random_policy(choose)
        params = SamplingParams(
            choose.choice([0.0, 0.6, 1.5]), seed=number, top_k=choose.choice([0, 4]),
            repetition_penalty=choose.choice([1.0, 1.3]), frequency_penalty=choose.choice([0, 0.4]),
        )  # fmt: skip
        options = {"eos_token_ids": (), "sampling": params}
        plain = generate(target, prompt, 10, **options)
        drafted = generate(target, prompt, 10, draft, policy=policy, **options)
        assert drafted.tokens == plain.tokens, f"block {block}, number {number}: {policy} {params}"
        assert drafted.stats.num_target_passes <= plain.stats.num_target_passes


def by_prefix(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor of which every token of a prefix changes every score."""
    rows = [random.Random(str(prefix)) for prefix in ids.tolist()]
    return scores + torch.tensor([[row.gauss(0, 0.5) for _ in range(VOCAB)] for row in rows])


@pytest.mark.parametrize("policy", [Chain(4), StaticTree(BINARY), DynamicTree(20, 4, 4)], ids=str)
def test_processors_get_the_prefix_of_every_node(policy):
    target = random_target(3, num_hidden_layers=4)
    draft, accepted = random_draft(3, target), 0
    for seed in range(4):
        params = SamplingParams(0.5, seed=seed, logits_processors=[by_prefix])
        options = {"eos_token_ids": (), "sampling": params}
        plain = generate(target, random_prompt(seed), 16, **options)
        drafted = generate(target, random_prompt(seed), 16, draft, policy=policy, **options)
        assert drafted.tokens == plain.tokens
        accepted += drafted.stats.num_accepted_tokens
    assert accepted > 0


class ScriptedTrees(ScriptedDrafter):
    """The truth on the deepest branch of a tree of `paths`, wrong tokens on all others."""

    paths = ((0,), (1,), (2,), (1, 0), (2, 0), (2, 1), (2, 1, 0))

    def continued(self) -> DraftTree:
        rows = {path: row for row, path in enumerate([(), *self.paths])}
        tokens = []
        for path in self.paths:
            at = self.known + len(path) - 1
            truth = self.plain[at] if at < len(self.plain) else 0
            is_true = path == (2, 1, 0)[: len(path)]
            tokens.append(truth if is_true else (truth + 1 + path[-1]) % VOCAB)
        return fixed_tree(torch.tensor([tokens]), (-1, *(rows[path[:-1]] for path in self.paths)))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_oracle_tree_is_accepted_to_its_depth(temperature):
    """Its branch is no prefix of the rows, so keys and values must be moved."""
    target, prompt = random_target(3, num_hidden_layers=4), random_prompt(CHUNK)
    params = SamplingParams(temperature, seed=1)
    plain = generate(target, prompt, 21, eos_token_ids=(), sampling=params)
    drafter = ScriptedTrees(plain.tokens, 1.0, 7)
    decoding = Decoding(target, prompt, 21, None, 7, (), drafter, sampling=params,
                        policy=StaticTree(ScriptedTrees.paths))  # fmt: skip
    bursts = list(decoding)
    assert [len(burst) for burst in bursts] == [1, 4, 4, 4, 4, 4]
    assert decoding.tokens == plain.tokens
    assert decoding.stats.acceptance_histogram == [0, 0, 0, 5]
    assert decoding.stats.acceptance_length == 4


@pytest.mark.parametrize("policy", [StaticTree(BINARY), DynamicTree(20, 4, 4)], ids=str)
def test_trees_up_to_the_last_position_of_the_context(policy):
    target = random_target(5, num_hidden_layers=4)
    draft = random_draft(5, target)
    for left in (1, 2, 3, 5):
        prompt = [7] * (CONTEXT - left)
        plain = generate(target, prompt, 100, eos_token_ids=())
        result = generate(target, prompt, 100, draft, eos_token_ids=(), policy=policy)
        assert result.tokens == plain.tokens
        assert len(result.tokens) == left


@dataclass(frozen=True)
class Observed:
    """A drafter, and the prompt and first token that it is to draft behind."""

    drafter: Any
    committed: Committed

    def propose(self) -> DraftTree:
        return self.drafter.propose(self.committed)

    def continuations(self, path, k) -> list[tuple[int, float]]:
        """The k likeliest tokens behind `path`, run alone as a chain, with log-probabilities."""
        draft, lengths = self.drafter.draft, self.committed.lengths_B
        output = self.drafter._catch_up(self.committed)
        for depth, token in enumerate(path):
            shape = chain_shape(1, lengths.device)
            step = device_step(self.drafter.cache, lengths + depth, shape)
            output = draft(torch.tensor([token]), output.next_hidden_TD, step)
        top = draft.top_tokens(output.post_norm_TD, k)
        return list(zip(top.ids_TA[0].tolist(), top.logprobs_TA[0].tolist(), strict=True))


def observed(policy: Policy, seed: int) -> Observed:
    target = random_target(seed, num_hidden_layers=4)
    draft = random_draft(seed, target)
    decoding = Decoding(target, [3, 1, 4, 1, 5, 9, 2, 6], 8, draft, policy=policy)
    passes, request = decoding.decodings.passes, decoding.decoded.request
    passes.rows.join(0, request)
    with torch.inference_mode():
        passes.prefill(0, request, 0, 8)
    return Observed(passes.drafter, passes.batch.committed(1))


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    parents, tokens = tree.shape.parents_N.view(-1).tolist(), [None, *tree.tokens_BN[0].tolist()]
    paths: list[tuple[int, ...]] = [()]
    for row in range(1, len(tokens)):
        paths.append((*paths[parents[row]], tokens[row]))
    return paths[1:]


FIXED = [Chain(5), StaticTree(BINARY), DynamicTree(6, 2, 3)]


@pytest.mark.parametrize("policy", FIXED, ids=str)
def test_a_policy_of_one_form_drafts_it_and_a_stop_has_none(policy):
    drafter = observed(policy, 1)
    with torch.inference_mode():
        tree = drafter.propose()
    assert policy.form == Form(tree.tokens_BN.shape[1], tree.depth, tree.is_chain)
    assert replace(policy, confidence_threshold=0.1).form is None
    assert CostAware(policy, RoundCosts({1: 1.0})).form is None


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_tree_is_eagle_2(seed):
    policy = DynamicTree(12, 3, 4)
    drafter = observed(policy, seed)
    with torch.inference_mode():
        tree = drafter.propose()
        pool, frontier = {}, {(): 0.0}
        for _ in range(4):
            level = {
                (*path, token): score + logprob
                for path, score in frontier.items()
                for token, logprob in drafter.continuations(path, 3)
            }
            pool |= level
            frontier = dict(sorted(level.items(), key=lambda item: -item[1])[:3])
    best = sorted(pool, key=lambda path: -pool[path])[:12]
    assert set(paths_of(tree)) == set(best)
    assert tree.shape.depths_N.tolist() == [[0, *map(len, paths_of(tree))]]
    words = Tree(tuple(tree.shape.parents_N[0].tolist())).ancestor_words()
    assert tree.shape.words_N is not None
    assert tree.shape.words_N.tolist() == [words]


@pytest.mark.parametrize("seed", range(3))
def test_static_tree_has_its_ranks(seed):
    drafter = observed(StaticTree(BINARY), seed)
    with torch.inference_mode():
        found = dict(zip(BINARY, paths_of(drafter.propose()), strict=True))
        for path in BINARY:
            begun = found[path[:-1]] if path[:-1] else ()
            assert found[path][-1] == drafter.continuations(begun, 3)[path[-1]][0]


@pytest.mark.parametrize("policy", [StaticTree(BINARY), DynamicTree(12, 3, 4)], ids=str)
def test_scores_are_the_log_probabilities_of_the_paths(policy):
    drafter = observed(policy, 2)
    with torch.inference_mode():
        tree = drafter.propose()
        known = {
            path: dict(drafter.continuations(path, 16))
            for path in {path[:-1] for path in paths_of(tree)}
        }
    expected = [sum(known[path[:i]][path[i]] for i in range(len(path))) for path in paths_of(tree)]
    torch.testing.assert_close(tree.scores_BN, torch.tensor([expected]))


def test_a_chain_is_a_static_tree():
    chain, line = Chain(4), StaticTree([(0,) * depth for depth in range(1, 5)])
    with torch.inference_mode():
        drafted, expected = observed(chain, 2).propose(), observed(line, 2).propose()
    assert drafted.tokens_BN.tolist() == expected.tokens_BN.tolist()
    torch.testing.assert_close(drafted.scores_BN, expected.scores_BN)


def test_confidence_stops_drafting():
    """A draft over 20 or more tokens is never this sure, so one level is all it drafts."""
    for policy in (Chain(6, 0.999), StaticTree(BINARY, 0.999), DynamicTree(12, 3, 4, 0.999)):
        drafter = observed(policy, 1)
        with torch.inference_mode():
            assert drafter.propose().depth == 1, policy


def test_policies_from_the_speculative_config():
    make = SpeculativeConfig.from_dict
    assert make({"num_speculative_tokens": 5}).policy == Chain(5)
    assert make({"confidence_threshold": 0.2}).policy == Chain(4, 0.2)
    dynamic = {"num_speculative_tokens": 8, "eagle_topk": 4, "num_steps": 3}
    assert make(dynamic).policy == DynamicTree(8, 4, 3)
    static = make({"speculative_token_tree": [[0, 0], [0]]}).policy
    assert static == StaticTree([(0,), (0, 0)])


BAD = [
    ({"num_speculative_tokens": 64}, "num_speculative_tokens: must be an integer 1..63"),
    ({"eagle_topk": 4}, "eagle_topk, num_steps: a dynamic tree needs both"),
    ({"eagle_topk": 17, "num_steps": 2}, "eagle_topk: must be an integer 1..16"),
    ({"eagle_topk": 2, "num_steps": 0}, "num_steps: must be an integer 1"),
    ({"eagle_topk": 16, "num_steps": 6}, "at most 64 nodes can be expanded"),
    ({"eagle_topk": 2, "num_steps": 1}, "1 steps of topk 2 have 2 candidates, got 4"),
    ({"speculative_token_tree": [[0]], "num_steps": 2}, "is a static tree"),
    ({"speculative_token_tree": []}, "must hold 1..63 paths, got 0"),
    ({"speculative_token_tree": [3]}, "must be a list of lists"),
    ({"speculative_token_tree": [[0, 0]]}, r"\[0, 0\] lacks its beginning \[0\]"),
    ({"speculative_token_tree": [[0], [0]]}, "a path is given twice"),
    ({"speculative_token_tree": [[16]]}, r"a path is ranks 0\.\.15"),
    ({"confidence_threshold": 1}, "confidence_threshold: must be in"),
    ({"confidence_threshold": "0.5"}, "confidence_threshold: must be a number"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_rejects_bad_policies(values, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig.from_dict(values)
