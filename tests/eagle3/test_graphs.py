"""Rounds of size classes: filled up with idle rows they write what they write alone.

Regimes: on the CPU a capture is the call itself, so all but CUDA's part runs: classes above the
number of sequences, both ways to choose, rules and rejection, a prompt that is being read beside,
what cannot be replayed and says why, a spent budget. A round takes nothing from the host that a
capture would freeze. What a capture takes is counted, beside what warm-ups gave back. With a GPU:
replays against the eager path, within their memory.
"""

import random
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from aerie.eagle3 import graphs
from aerie.eagle3.choice_form import EVERY_FILTER, GREEDY, ChoiceForm, RuleForm
from aerie.eagle3.cost_aware import CostAware
from aerie.eagle3.engine import Engine
from aerie.eagle3.generate import Decodings, generate
from aerie.eagle3.graphs import (
    GRAPH,
    CudaCapture,
    GraphedRounds,
    GraphMemoryError,
    forms_of,
    size_classes,
)
from aerie.eagle3.policies import Chain, DynamicTree, StaticTree
from aerie.eagle3.rows import Pair
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Decoded, Request
from aerie.eagle3.width import RoundCosts
from tests.test_lossless import random_draft, random_prompt, random_target
from tests.test_sampled_lossless import random_params

POLICIES = [Chain(3), StaticTree([[0], [1], [0, 0], [1, 0]]), DynamicTree(6, 3, 2), None]
DRAWN = [Chain(3, verification="rejection"), StaticTree([[0], [1], [0, 0]], 0.0, "rejection")]
PROCESSORS = SamplingParams(logits_processors=[NoRepeatNGramLogitsProcessor(2)])


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


def decoded(target, policy, requests, capture, capacity=5, draft=None) -> list[Decoded]:
    draft = draft or (None if policy is None else random_draft(1, target))
    pair = Pair(target, draft, policy or Chain(1))
    decodings = Decodings(pair, requests, capacity)
    passes = GraphedRounds(decodings.passes, requests, 1, capture)
    engine = Engine(passes, decodings.rows, 0)
    found = [engine.add(request) for request in requests]
    with torch.inference_mode():
        while engine.has_work:
            engine.step()
    assert decodings.rows.num_used_pages == 0
    return found


def requests_of(target, prompts, samplings, count=12) -> list[Request]:
    pairs = zip(prompts, samplings, strict=True)
    return [Request.checked(target, prompt, count, (), own) for prompt, own in pairs]


def alone(target, requests, draft=None, policy=None) -> list[list[int]]:
    return [
        generate(
            target, one.prompt_ids, 12, draft, policy=policy, eos_token_ids=(),
            sampling=replace(one.sampling, seed=one.seed),
        ).tokens
        for one in requests
    ]  # fmt: skip


def launches(found: list[Decoded]) -> set[str]:
    return {why for one in found for why in one.stats.launches}


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_idle_rows_change_nothing(policy):
    choose, target = random.Random(1), random_target(1, num_hidden_layers=4)
    prompts = [random_prompt(seed) for seed in range(7)]
    mixed = [
        SamplingParams(choose.choice([0.0, 1.0]), choose.choice([0, 5]), choose.choice([1.0, 0.8]),
                       seed=seed, max_tokens=choose.randint(1, 12))
        for seed in range(7)
    ]  # fmt: skip
    ruled = [random_params(choose) for _ in range(6)]
    for samplings, num_forms in (
        ([SamplingParams()] * 7, 1),
        ([SamplingParams(), *mixed[1:]], 2),
        ([replace(mixed[0], temperature=0.7), *ruled], 1),
    ):
        requests, capture = requests_of(target, prompts, samplings), CountedCapture()
        found = decoded(target, policy, requests, capture)
        assert [one.tokens for one in found] == alone(target, requests)
        assert capture.captured == num_forms * len(size_classes(5))
        assert launches(found) == {GRAPH}
        assert capture.replayed > 0


@pytest.mark.parametrize("policy", DRAWN, ids=str)
def test_rejection_is_replayed(policy):
    target, choose = random_target(1, num_hidden_layers=4), random.Random(4)
    prompts = [random_prompt(seed) for seed in range(6)]
    samplings = [SamplingParams(), *(random_params(choose) for _ in range(5))]
    requests, draft = requests_of(target, prompts, samplings), random_draft(1, target)
    found = decoded(target, policy, requests, CountedCapture(), 4, draft)
    assert [one.tokens for one in found] == alone(target, requests, draft, policy)
    assert launches(found) == {GRAPH}


def test_a_prompt_that_is_read_while_it_fills_up_a_round(monkeypatch):
    """Its rules see its own prompt afterwards, and the draft its own rows: in a class of four the
    fourth row is that prompt's for a dozen rounds."""
    for module in ("engine", "rows"):
        monkeypatch.setattr(f"aerie.eagle3.{module}.PREFILL_ROWS", 8)
    target = random_target(3, context=300, num_hidden_layers=4)
    prompts = [[1], [2], [3], [7 * i % 23 for i in range(100)]]
    rules = SamplingParams(repetition_penalty=1.9, bad_words_ids=[[3, 7]], frequency_penalty=0.4)
    requests = [
        Request.checked(target, prompt, 40, (), rules) for prompt in prompts
    ]  # fmt: skip
    counts, draft = [], random_draft(3, target)
    for capture in (CountedCapture(), CountedCapture(most=0)):
        found = decoded(target, Chain(3), requests, capture, 4, draft)
        counts.append([(one.tokens, one.stats.accepted_at) for one in found])
        assert (GRAPH in launches(found)) == (capture.most > 0)
    assert counts[0] == counts[1]
    own = generate(target, prompts[3], 40, eos_token_ids=(), sampling=rules)
    assert counts[0][3][0] == own.tokens


def test_a_spent_budget_leaves_the_smaller_classes_eager(caplog):
    target, prompts = random_target(1, num_hidden_layers=4), [[1, 2], [3]]
    capture = CountedCapture(most=1)
    requests = requests_of(target, prompts, [SamplingParams()] * 2)
    found = decoded(target, Chain(3), requests, capture)
    assert [one.tokens for one in found] == alone(target, requests)
    assert "run without a CUDA graph: the budget of the test" in caplog.text
    assert launches(found) == {GRAPH}
    none = decoded(target, Chain(3), requests, CountedCapture(most=0))
    assert launches(none) == {graphs.NO_MEMORY}
    assert [one.tokens for one in none] == alone(target, requests)


EAGER = {
    "stop": (Chain(3, 0.5), SamplingParams(), graphs.HOST_DECIDES),
    "width": (
        CostAware(Chain(3), RoundCosts({1: 1.0, 4: 1.5})), SamplingParams(), graphs.HOST_DECIDES
    ),
    "processors": (Chain(3), PROCESSORS, graphs.PROCESSORS),
}  # fmt: skip


@pytest.mark.parametrize("case", EAGER)
def test_what_the_host_takes_part_in_runs_eagerly_and_says_so_once(case, caplog):
    policy, params, why = EAGER[case]
    target = random_target(1, num_hidden_layers=4)
    requests, capture = requests_of(target, [[1, 2], [3]], [params] * 2), CountedCapture()
    found = decoded(target, policy, requests, capture)
    assert [one.tokens for one in found] == alone(target, requests)
    assert launches(found) == {why}
    assert capture.replayed == 0
    assert caplog.text.count(f"rounds that run without a CUDA graph: {why}") == 1


def test_only_the_rounds_with_processors_are_eager():
    target = random_target(1, num_hidden_layers=4)
    params = [SamplingParams(), replace(PROCESSORS, max_tokens=4)]
    requests = requests_of(target, [[1, 2], [3]], params)
    found = decoded(target, Chain(2), requests, CountedCapture())
    assert [one.tokens for one in found] == alone(target, requests)
    assert set(found[1].stats.launches) == {graphs.PROCESSORS}
    assert set(found[0].stats.launches) == {graphs.PROCESSORS, GRAPH}
    assert sum(found[0].stats.launches.values()) == len(found[0].stats.rounds)


def test_rules_that_no_graph_was_captured_with_run_eagerly():
    """Their tables have grown: those that the graphs read are not written any more."""
    target = random_target(1, num_hidden_layers=4)
    plain, ruled = requests_of(
        target, [[1, 2], [3]], [SamplingParams(), SamplingParams(bad_words_ids=[[1, 2]])]
    )
    decodings = Decodings(Pair(target, None, Chain(1)), [plain], 1)
    passes = GraphedRounds(decodings.passes, [plain], 1, CountedCapture())
    engine = Engine(passes, decodings.rows, 0)
    found = [engine.add(one) for one in (plain, ruled, plain)]
    with torch.inference_mode():
        while engine.has_work:
            engine.step()
    assert [set(one.stats.launches) for one in found] == [{GRAPH}, *[{graphs.NEW_RULES}] * 2]
    assert [one.tokens for one in found] == alone(target, [plain, ruled, plain])


def test_graphs_need_a_gpu():
    target = random_target(1, num_hidden_layers=4)
    requests = [Request.checked(target, [1, 2], 4)]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda_graph_bytes: needs a GPU"):
            Decodings(Pair(target, None, Chain(3)), requests, cuda_graph_bytes=1)


class FakeCuda:
    """CUDA's allocator as a capture meets it: `torch.cuda.graph` empties the cache first."""

    def __init__(self, monkeypatch, of_warm_ups: int) -> None:
        self.of_warm_ups, self.of_graphs = of_warm_ups, 0
        own = {
            "synchronize": lambda: None,
            "graph_pool_handle": lambda: None,
            "CUDAGraph": lambda: None,
            "memory_reserved": lambda: self.of_warm_ups + self.of_graphs,
            "empty_cache": self.empty_cache,
            "graph": self.graph,
        }
        for name, value in own.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def empty_cache(self) -> None:
        self.of_warm_ups = 0

    @contextmanager
    def graph(self, graph, pool):
        self.empty_cache()
        yield

    def take(self, num_bytes: int) -> None:
        self.of_graphs += num_bytes


@pytest.mark.parametrize("of_warm_ups", [0, 100])
def test_a_capture_counts_what_it_takes(monkeypatch, of_warm_ups):
    cuda = FakeCuda(monkeypatch, of_warm_ups)
    capture = CudaCapture(50)
    capture(lambda: cuda.take(40))
    cuda.of_warm_ups = of_warm_ups  # those of the next class
    with pytest.raises(GraphMemoryError, match="80 bytes, 50 are allowed"):
        capture(lambda: cuda.take(40))
    with pytest.raises(GraphMemoryError, match="80 of 50 bytes are used"):
        capture(lambda: cuda.take(0))


def test_forms_cover_what_they_are_made_of():
    target = random_target(1, num_hidden_layers=4)
    words = SamplingParams(0.7, top_k=3, bad_words_ids=[[1], [2, 3, 4]])
    early = SamplingParams(min_tokens=3, stop_token_ids=[1, 2], logit_bias={1: 1.0})
    for samplings in ([words, early], [SamplingParams(), words]):
        forms = forms_of(requests_of(target, [[1], [2]], samplings))
        for own in samplings:
            assert forms[0].covers(ChoiceForm.of(own, ()))
    assert forms[1:] == [GREEDY]
    assert forms[0].rules == RuleForm(num_words=2, longest_beginning=2)
    assert not GREEDY.covers(EVERY_FILTER)
    assert EVERY_FILTER.covers(GREEDY)
    assert not EVERY_FILTER.covers(forms[0])


def test_size_classes():
    assert size_classes(1) == [1]
    assert size_classes(5) == [1, 2, 4, 5]
    assert size_classes(8) == [1, 2, 4, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [*POLICIES, *DRAWN], ids=str)
def test_replays_on_a_gpu(policy):
    device = torch.device("cuda")
    target = random_target(1, "triton", num_hidden_layers=4).to(device)
    draft = None if policy is None else random_draft(1, target).to(device)
    if draft is not None:
        draft.bind(target)
    prompts = [random_prompt(seed) for seed in range(7)]
    requests = [
        Request.checked(target, p, 12, (), SamplingParams(i % 2, seed=i, frequency_penalty=0.2))
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
