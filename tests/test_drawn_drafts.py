"""`verification: rejection` through the whole loop: drawn drafts give the target's distribution.

The joint of three tokens over thousands of seeds, sequences of one batch, by chi-square against the
target's own probabilities; loops that misjudge their drafts must fail. Greedy requests are exact, a
sequence does not depend on its neighbours, and what cannot be verified so is refused.
"""

from dataclasses import replace

import pytest
import torch

from aerie.eagle3 import sampled_drafts
from aerie.eagle3.cost_aware import CostAware
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.eagle3.policies import Chain, Policy, StaticTree
from aerie.eagle3.rejection import Drawn
from aerie.eagle3.sampler import ChoiceRows, Sampler
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.eagle3.width import RoundCosts
from aerie.embedded import DRAFT, TARGET
from aerie.llama4.device_steps import chain_shape
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer
from tests.test_lossless import random_draft, random_prompt, random_target

TREE = ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
POLICIES = [Chain(3, verification="rejection"), StaticTree(TREE, verification="rejection")]
KEPT, HEAT, BATCH = 3, 2.0, 200
LIMIT = 77.0  # chi-square of 26 degrees of freedom, alpha 1e-6


@pytest.fixture(scope="module")
def pair():
    target = random_target(7, num_hidden_layers=4)
    return target, random_draft(7, target)


@pytest.fixture(scope="module")
def trained():
    """A draft that knows its target: what it proposes is mostly what the target may say."""
    target = Llama4ForCausalLM.from_pretrained(TARGET)
    return target, Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, target)


@torch.inference_mode()
def expected(target, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Probabilities of the 27 continuations of three tokens, from passes over whole texts."""
    shares: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for begin, share in shares.items():
            ids = torch.tensor([*prompt, *begin])
            logits = target(ids, target.allocate_cache(99).causal_step(len(ids))).logits_TV[-1]
            top = (logits / HEAT).topk(KEPT)
            for token, p in zip(top.indices.tolist(), top.values.softmax(0).tolist(), strict=True):
                longer[(*begin, token)] = share * p
        shares = longer
    return shares


def chi_square(pair, policy: Policy, count: int) -> float:
    (target, draft), prompt = pair, load_tokenizer(TARGET).encode("The with statement").ids
    shares = expected(target, prompt)
    params = [SamplingParams(HEAT, top_k=KEPT, seed=seed) for seed in range(count)]
    texts = generate(target, [prompt] * count, 3, draft, eos_token_ids=(), sampling=params,
                     policy=policy, max_batch_size=BATCH)  # fmt: skip
    counts = dict.fromkeys(shares, 0)
    for text in texts:
        counts[tuple(text.tokens)] += 1  # a token outside the top-k would be a KeyError
    return sum((counts[t] - count * p) ** 2 / (count * p) for t, p in shares.items())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_joint_of_three_tokens(trained, policy):
    assert chi_square(trained, policy, 400) < LIMIT


@pytest.mark.parametrize(("mistake", "count"), [("draft temperature", 400), ("greedy draft", 100)])
def test_mistakes_would_show(trained, monkeypatch, mistake, count):
    honest = sampled_drafts.drawn_siblings

    def mistaken(logits_RU, temperatures_R, *rest):
        drawn_at = 0 * temperatures_R if mistake == "greedy draft" else temperatures_R / 2
        told = honest(logits_RU, temperatures_R, *rest).probs_RU
        return replace(honest(logits_RU, drawn_at, *rest), probs_RU=told)

    monkeypatch.setattr(sampled_drafts, "drawn_siblings", mistaken)
    assert chi_square(trained, POLICIES[0], count) > LIMIT


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_sequence_does_not_depend_on_its_neighbours(pair, policy):
    """Sampled and greedy ones mixed, with penalties; greedy ones are as without a draft."""
    target, draft = pair
    prompts = [random_prompt(number) for number in range(12)]
    params = [
        SamplingParams((0.0, 0.7, 1.3)[number % 3], seed=number, top_p=(1.0, 0.9)[number % 2],
                       frequency_penalty=(0.0, 0.5)[number % 2])
        for number in range(12)
    ]  # fmt: skip
    together = generate(target, prompts, 9, draft, eos_token_ids=(), sampling=params, policy=policy)
    for text, prompt, own in zip(together, prompts, params, strict=True):
        options = {"eos_token_ids": (), "sampling": own}
        assert text.tokens == generate(target, prompt, 9, draft, policy=policy, **options).tokens
        if own.is_greedy:
            assert text.tokens == generate(target, prompt, 9, **options).tokens


def test_triton_backend():
    """The same choices from the kernels, for trees of which some tokens are accepted."""
    sequences, rows, vocabulary = 4, 3, 32
    generator = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(sequences * rows, vocabulary, generator=generator)
    best_BN = logits_TV[:, :20].argmax(-1).view(sequences, rows)
    tokens_BN = best_BN.roll(1, dims=1)  # the child of every row is its best
    probs_BNU = torch.full((sequences, rows, 20), 1 / 20)
    probs_BNU.scatter_(2, best_BN[:, :, None], 0.3)
    children_NS, ranks_N = torch.tensor([[1], [2], [-1]]), torch.zeros(rows, dtype=torch.int64)
    drawn = Drawn(children_NS, ranks_N, probs_BNU, torch.arange(20))
    positions_T = (5 + torch.arange(rows)).repeat(sequences)
    shape, lengths_B = chain_shape(rows, positions_T.device), torch.full((sequences,), 5)
    chosen = []
    for backend in ("eager", "triton"):
        known_BS = torch.zeros(sequences, 20, dtype=torch.int64)
        sampler = Sampler(known_BS, vocabulary, backend, positions_T.device)
        for number in range(sequences):
            sampler.join(number, SamplingParams(0.9, top_k=8), number, (), 3)
        at = ChoiceRows(0, lengths_B, tokens_BN, shape, positions_T)
        chosen.append(sampler.choose(logits_TV, at, drawn, 2).tolist())
    assert chosen[0] == chosen[1]
    assert sum(token >= 0 for token in chosen[0]) > sequences


def test_no_distribution_is_an_error():
    target = random_target(1)
    draft = random_draft(1, target)
    target.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="contain NaN or"):
        generate(target, [1, 2], 4, draft, policy=POLICIES[0], sampling=SamplingParams(1.0))


def test_rejects_what_is_cut_over_ranks(pair, monkeypatch):
    target, draft = pair
    monkeypatch.setattr(Sampler, "is_cut", True)
    with pytest.raises(ValueError, match="verification: 'rejection' needs whole vocabularies"):
        generate(target, [1, 2], 4, draft, policy=POLICIES[0], sampling=SamplingParams(1.0))


BAD = [
    ({"verification": "typical"}, "verification: must be match or rejection, got 'typical'"),
    ({"eagle_topk": 4, "num_steps": 2}, "verification: must be match for a dynamic tree"),
    ({"cost_aware_width": "measured"}, "cost_aware_width: leaves out nodes by their own"),
    ({"speculative_token_tree": [[1]]}, r"\[1\] lacks \[0\], which is drawn before it"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_rejects_what_rejection_cannot_verify(values, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig.from_dict({"verification": "rejection"} | values)


def test_from_the_speculative_config():
    make = SpeculativeConfig.from_dict
    assert make({"verification": "rejection"}).policy == Chain(4, verification="rejection")
    assert make({}).policy.verification == "match"
    with pytest.raises(ValueError, match="cost_aware_width: leaves out nodes by their own"):
        CostAware(POLICIES[0], RoundCosts({1: 1.0, 4: 2.0}))
