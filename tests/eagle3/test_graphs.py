"""Rounds of size classes: filled up with idle rows they write what they write alone.

Regimes: on the CPU a capture is the call itself, so all but CUDA's part runs: classes above the
number of sequences, both ways to choose, rules beside them, policies that cannot be captured, a
spent budget. With a GPU: replays against the eager path, within their memory.
"""

import random

import pytest
import torch

from aerie.eagle3.engine import Engine
from aerie.eagle3.generate import Decodings, generate
from aerie.eagle3.graphs import GraphedRounds, GraphMemoryError, size_classes
from aerie.eagle3.policies import Chain, DynamicTree, StaticTree
from aerie.eagle3.rows import Pair
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Request
from tests.test_lossless import random_draft, random_prompt, random_target

POLICIES = [Chain(3), StaticTree([[0], [1], [0, 0], [1, 0]]), DynamicTree(6, 3, 2), None]


class CountedCapture:
    """The call as it is; `sizes` of what was replayed."""

    def __init__(self, most: int = 99) -> None:
        self.captured, self.replayed, self.most = 0, 0, most

    def __call__(self, call):
        if self.captured == self.most:
            raise GraphMemoryError("the budget of the test")
        self.captured += 1

        def replay():
            self.replayed += 1
            return call()

        return replay


def decoded(target, policy, prompts, samplings, capture, count=12) -> list[list[int]]:
    draft = None if policy is None else random_draft(1, target)
    requests = [
        Request.checked(target, prompt, count, (), own)
        for prompt, own in zip(prompts, samplings, strict=True)
    ]
    pair = Pair(target, draft, policy or Chain(1))
    decodings = Decodings(pair, requests, 5)
    passes = GraphedRounds(decodings.passes, 1, capture)
    engine = Engine(passes, decodings.rows, 0)
    found = [engine.add(request) for request in requests]
    with torch.inference_mode():
        while engine.has_work:
            engine.step()
    assert decodings.rows.num_used_pages == 0
    return [one.tokens for one in found]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_idle_rows_change_nothing(policy):
    choose, target = random.Random(1), random_target(1, num_hidden_layers=4)
    prompts = [random_prompt(seed) for seed in range(7)]
    mixed = [
        SamplingParams(choose.choice([0.0, 1.0]), choose.choice([0, 5]), choose.choice([1.0, 0.8]),
                       seed=seed, max_tokens=choose.randint(1, 12))
        for seed in range(7)
    ]  # fmt: skip
    rules = [SamplingParams(1.0, seed=seed, repetition_penalty=1.2) for seed in range(7)]
    for samplings in ([SamplingParams()] * 7, mixed, [*mixed[:3], *rules[3:]]):
        alone = [
            generate(target, prompt, 12, eos_token_ids=(), sampling=own).tokens
            for prompt, own in zip(prompts, samplings, strict=True)
        ]
        capture = CountedCapture()
        assert decoded(target, policy, prompts, samplings, capture) == alone
        assert capture.captured == 2 * len(size_classes(5))
        has_rules = any(own.repetition_penalty > 1 for own in samplings)
        assert capture.replayed > 0 or has_rules


def test_a_spent_budget_leaves_the_smaller_classes_eager(caplog):
    target, prompts = random_target(1, num_hidden_layers=4), [[1, 2], [3]]
    capture = CountedCapture(most=1)
    expected = [generate(target, prompt, 12, eos_token_ids=()).tokens for prompt in prompts]
    assert decoded(target, Chain(3), prompts, [SamplingParams()] * 2, capture) == expected
    assert "run without a CUDA graph: the budget of the test" in caplog.text
    assert capture.replayed > 0


def test_what_cannot_be_captured_is_refused():
    target = random_target(1, num_hidden_layers=4)
    draft = random_draft(1, target)
    requests = [Request.checked(target, [1, 2], 4)]
    with pytest.raises(ValueError, match="cuda_graph_bytes: a round must have one shape"):
        Decodings(Pair(target, draft, Chain(3, 0.5)), requests, cuda_graph_bytes=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda_graph_bytes: needs a GPU"):
            Decodings(Pair(target, draft, Chain(3)), requests, cuda_graph_bytes=1)


def test_size_classes():
    assert size_classes(1) == [1]
    assert size_classes(5) == [1, 2, 4, 5]
    assert size_classes(8) == [1, 2, 4, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_replays_on_a_gpu(policy):
    device = torch.device("cuda")
    target = random_target(1, "triton", num_hidden_layers=4).to(device)
    draft = None if policy is None else random_draft(1, target).to(device)
    if draft is not None:
        draft.bind(target)
    prompts = [random_prompt(seed) for seed in range(7)]
    requests = [
        Request.checked(target, p, 12, (), SamplingParams(i % 2, seed=i))
        for i, p in enumerate(prompts)
    ]
    pair = Pair(target, draft, policy or Chain(1))
    found = []
    for budget in (0, 2**28):
        decodings = Decodings(pair, requests, 5, cuda_graph_bytes=budget)
        for _ in decodings:
            pass
        found.append([one.tokens for one in decodings.decoded])
    assert found[0] == found[1]
