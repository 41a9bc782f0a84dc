"""Sampled ids with a draft equal sampled ids without, exactly, in float32, for every sampler.

The draw of a position depends on its prefix, the seed and the position alone, so this is an
identity and no statistic. Regimes: random models, prompts around chunk edges, seeds and settings of
all rules together; each rule alone, with drafts that are right, half right and wrong; ends inside
an accepted run; a custom processor sees the right prefix at every row; a control that must fail.
"""

import random
from dataclasses import replace

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, TopKLogitsWarper

from aerie.eagle3.decoding import Decoding
from aerie.eagle3.ends import Ends
from aerie.eagle3.generate import generate
from aerie.eagle3.sampler import Sampler
from aerie.eagle3.sampling import SamplingParams
from tests.test_lossless import (
    CHUNK,
    VOCAB,
    ScriptedDrafter,
    random_draft,
    random_prompt,
    random_target,
)

RULES = {
    "temperature": {"temperature": 1.0},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.2},
    "top-k": {"temperature": 1.5, "top_k": 5},
    "top-p": {"temperature": 1.5, "top_p": 0.7},
    "min-p": {"temperature": 2.0, "min_p": 0.1},
    "all filters": {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    "repetition": {"temperature": 1.0, "repetition_penalty": 1.7},
    "greedy repetition": {"repetition_penalty": 1.7},
    "presence and frequency": {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    "bias": {"temperature": 1.0, "logit_bias": {3: 4.0, 4: -100}},
    "bad words": {"temperature": 1.0, "bad_words_ids": [[5], [6, 7], [1, 2, 3]]},
    "min tokens": {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": [0, 1, 2, 3, 4, 5]},
    "processors": {
        "temperature": 1.0,
        "logits_processors": [NoRepeatNGramLogitsProcessor(2), TopKLogitsWarper(9)],
    },
}


def random_params(choose: random.Random) -> SamplingParams:
    """Any mixture of rules."""

    def maybe(value, off):
        return value if choose.random() < 0.3 else off

    return SamplingParams(
        temperature=choose.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=maybe(choose.randint(2, 20), 0),
        top_p=maybe(choose.uniform(0.5, 0.99), 1.0),
        min_p=maybe(choose.uniform(0.01, 0.2), 0.0),
        seed=choose.getrandbits(63),
        repetition_penalty=maybe(choose.uniform(0.8, 1.5), 1.0),
        presence_penalty=maybe(choose.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(choose.uniform(-1, 1), 0.0),
        logit_bias=maybe({choose.randrange(VOCAB): choose.uniform(-5, 5)}, {}),
        bad_words_ids=maybe([[choose.randrange(VOCAB) for _ in range(choose.randint(1, 3))]], ()),
        min_tokens=maybe(choose.randint(1, 8), 0),
        stop_token_ids=maybe([choose.randrange(VOCAB)], ()),
    )


def scripted(target, prompt, plain, right: float, k: int, params, **options) -> Decoding:
    """A finished decoding with drafts that are right with probability `right`."""
    drafter = ScriptedDrafter(plain, right, k)
    options = {"eos_token_ids": ()} | options
    decoding = Decoding(target, prompt, num_speculative_tokens=k, drafter=drafter, **options,
                        sampling=params)  # fmt: skip
    list(decoding)
    return decoding


@pytest.mark.parametrize("block", range(8))
def test_random_requests(block):
    """8 x 32 random requests, each with two random drafts or scripts."""
    choose = random.Random(block)
    target = random_target(block, num_hidden_layers=4)
    draft = random_draft(block, target)
    for number in range(32):
        prompt, params = random_prompt(32 * block + number), random_params(choose)
        count, k = choose.choice([3, 7, 12]), choose.randint(1, 6)
        plain = generate(target, prompt, count, eos_token_ids=(), sampling=params)
        label = f"block {block}, number {number}, k {k}: {params}"
        drafted = generate(target, prompt, count, draft, k, eos_token_ids=(), sampling=params)
        assert drafted.tokens == plain.tokens, label
        assert drafted.finish_reason == plain.finish_reason, label
        half = scripted(target, prompt, plain.tokens, 0.7, k, params, max_new_tokens=count)
        assert half.tokens == plain.tokens, label


@pytest.mark.parametrize("rule", RULES)
def test_each_rule(rule):
    """An oracle is accepted whole, a liar never, and both write what plain decoding writes."""
    target, prompt = random_target(7, num_hidden_layers=4), random_prompt(5)
    for seed in (0, 1, -9):
        params = SamplingParams(seed=seed, **RULES[rule])
        plain = generate(target, prompt, 13, eos_token_ids=(), sampling=params)
        count = len(plain.tokens)
        passes = {}
        for right in (1.0, 0.5, 0.0):
            result = scripted(target, prompt, plain.tokens, right, 3, params, max_new_tokens=13)
            assert result.tokens == plain.tokens, f"right {right}, seed {seed}"
            passes[right] = result.stats.num_target_passes
        assert passes[1.0] == 1 + -(-(count - 1) // 4)
        assert passes[0.0] == plain.stats.num_target_passes == count


def test_rules_do_something():
    """The identities above would hold for rules that are ignored."""
    target, prompt = random_target(7, num_hidden_layers=4), random_prompt(5)

    def tokens(**settings) -> list[int]:
        params = SamplingParams(seed=3, **settings)
        return generate(target, prompt, 24, eos_token_ids=(), sampling=params).tokens

    plain = tokens(temperature=1.0)
    greedy = tokens()
    for rule, settings in RULES.items():
        assert tokens(**settings) != (plain if "temperature" in settings else greedy) or (
            rule == "temperature"
        ), rule
    assert len(set(tokens(presence_penalty=2.0))) > len(set(greedy))
    assert 5 not in tokens(temperature=3.0, bad_words_ids=[[5]])
    assert set(tokens(temperature=1.0, logit_bias={3: 100})) == {3}
    assert generate(target, prompt, 24, eos_token_ids=(), sampling=SamplingParams(
        temperature=1.0, seed=4)).tokens != plain  # fmt: skip


def test_bad_words_never_appear():
    target, prompt = random_target(7, num_hidden_layers=4), [6, 7, 6]
    for seed in range(4):
        params = SamplingParams(1.5, seed=seed, bad_words_ids=[[6, 7], [1, 2, 3]])
        text = prompt + generate(target, prompt, 40, eos_token_ids=(), sampling=params).tokens
        assert [6, 7] not in [text[i : i + 2] for i in range(2, len(text))]
        assert [1, 2, 3] not in [text[i : i + 3] for i in range(len(text))]


def test_penalties_follow_their_formulas():
    """One token: repetition counts prompt and output, the others the output alone."""
    target, prompt = random_target(2, num_hidden_layers=4), [4, 4, 9]
    seen = []

    def spy(ids, scores):
        seen.append(scores.clone())
        return scores

    base = SamplingParams(logits_processors=[spy])
    first = generate(target, prompt, 2, eos_token_ids=(), sampling=base).tokens[0]
    logits = seen[1][0]
    bias = {first: 100.0}  # the same first token whatever the penalties do to it
    seen.clear()
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    params = replace(base, logit_bias=bias, **penalties)
    generate(target, prompt, 2, eos_token_ids=(), sampling=params)
    expected = logits.clone()
    expected[first] += 100.0
    for token in {*prompt, first}:
        factor = 1 / 1.5 if expected[token] > 0 else 1.5
        expected[token] *= factor
    expected[first] -= 0.75
    torch.testing.assert_close(seen[1][0], expected)


@pytest.mark.parametrize("right", [1.0, 0.6])
def test_processor_sees_the_prefix_of_every_row(right):
    """Each call's ids are the known tokens, then the drafted ones down to the row."""
    target, prompt = random_target(3, num_hidden_layers=4), random_prompt(3)
    plain = generate(target, prompt, 12, eos_token_ids=(), sampling=SamplingParams(seed=1)).tokens
    seen = []

    def spy(ids, scores):
        seen.append(ids.tolist())
        return scores

    params = SamplingParams(seed=1, logits_processors=[spy])
    result = scripted(target, prompt, plain, right, 3, params, max_new_tokens=12)
    truth = prompt + plain
    prefixes = [row for call in seen for row in call]
    for length in range(len(prompt), len(truth)):
        assert truth[:length] in prefixes
    assert result.tokens == plain


def text(ids) -> str:
    """A letter to a token."""
    return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("where", range(1, 9))
@pytest.mark.parametrize("kind", ["eos_token_ids", "stop_token_ids", "stop", "max_tokens"])
def test_ends_inside_an_accepted_run(kind, where):
    target, prompt = random_target(3, num_hidden_layers=4), random_prompt(3)
    params = SamplingParams(temperature=1.5, seed=2)
    plain = generate(target, prompt, 14, eos_token_ids=(), sampling=params).tokens
    options, reason = {"eos_token_ids": (), "max_new_tokens": 14, "detokenize": text}, "stop"
    if kind == "eos_token_ids":
        options, reason = options | {"eos_token_ids": (plain[where],)}, "eos"
    elif kind == "max_tokens":
        params, reason = replace(params, max_tokens=where), "length"
    elif kind == "stop":
        params = replace(params, stop=text(plain[where - 1 : where + 1]))
    else:
        params = replace(params, stop_token_ids=[plain[where]])
    expected = generate(target, prompt, sampling=params, **options)
    result = scripted(target, prompt, plain, 1.0, 5, params, **options)
    assert result.tokens == expected.tokens == plain[: len(expected.tokens)]
    assert result.finish_reason == expected.finish_reason == reason
    if kind == "stop":
        assert text(result.tokens).endswith(params.stop_strings[0])


def test_stop_string_waits_for_min_tokens():
    ends = Ends(frozenset(), frozenset(), ("ab",), 5, 20, 3, 99, lambda ids: "".join(map(chr, ids)))
    run = [ord(c) for c in "abxxabxx"]
    assert ends.cut([], run) == (run[:6], "stop")
    with pytest.raises(ValueError, match="stop: strings are found in text; pass detokenize"):
        replace(ends, detokenize=None)


def test_noise_by_row_would_show(monkeypatch):
    """The control: with noise keyed by the row of the pass instead of the position ids differ."""
    target, prompt = random_target(4, num_hidden_layers=4), random_prompt(CHUNK)
    params = SamplingParams(temperature=1.5, seed=5)
    plain = generate(target, prompt, 20, eos_token_ids=(), sampling=params).tokens
    honest = Sampler._drawn

    def by_row(self, logits_TV, positions_T, *sequences):
        return honest(self, logits_TV, torch.arange(len(logits_TV)), *sequences)

    monkeypatch.setattr(Sampler, "_drawn", by_row)
    wrong_plain = generate(target, prompt, 20, eos_token_ids=(), sampling=params).tokens
    wrong = scripted(target, prompt, wrong_plain, 0.7, 3, params, max_new_tokens=20)
    assert wrong.tokens != wrong_plain
    assert plain != wrong_plain


@pytest.mark.parametrize("least", range(1, 8))
def test_min_tokens_inside_an_accepted_run(least):
    """The end token is all but certain, so the text ends as soon as it may."""
    target, prompt = random_target(3, num_hidden_layers=4), random_prompt(3)
    params = SamplingParams(1.0, seed=2, logit_bias={0: 100}, stop_token_ids=[0], min_tokens=least)
    plain = generate(target, prompt, 14, eos_token_ids=(), sampling=params)
    result = scripted(target, prompt, plain.tokens, 1.0, 5, params, max_new_tokens=14)
    assert result.tokens == plain.tokens
    assert plain.tokens.index(0) == least == len(plain.tokens) - 1


def test_noise_is_that_of_the_position_of_the_drawn_token(monkeypatch):
    """One noise for all positions would be an identity too, and no sample."""
    target, prompt = random_target(3, num_hidden_layers=4), [5, 6, 7]
    honest, seen = Sampler._drawn, []

    def spy(self, logits_TV, positions_T, *sequences):
        seen.append(positions_T.tolist())
        return honest(self, logits_TV, positions_T, *sequences)

    monkeypatch.setattr(Sampler, "_drawn", spy)
    params = SamplingParams(1.0, seed=1)
    plain = generate(target, prompt, 5, eos_token_ids=(), sampling=params).tokens
    assert seen == [[3], [4], [5], [6], [7]]
    seen.clear()
    scripted(target, prompt, plain, 1.0, 3, params, max_new_tokens=5)
    assert seen == [[3], [4, 5, 6, 7]]


def test_seed_is_reported_and_repeats_the_run():
    target, prompt = random_target(1, num_hidden_layers=4), [1, 2, 3]
    first = generate(target, prompt, 12, eos_token_ids=(), sampling=SamplingParams(1.0))
    again = SamplingParams(1.0, seed=first.seed)
    assert generate(target, prompt, 12, eos_token_ids=(), sampling=again).tokens == first.tokens
    other = generate(target, prompt, 12, eos_token_ids=(), sampling=SamplingParams(1.0))
    assert other.seed != first.seed
    assert generate(target, prompt, 2, eos_token_ids=()).seed is None


def test_triton_backend_draws_the_same():
    eager, triton = (
        random_target(9, num_hidden_layers=4),
        random_target(9, "triton", num_hidden_layers=4),
    )
    params = SamplingParams(1.0, top_k=9, top_p=0.9, seed=8)
    plain = generate(eager, [3, 4], 4, eos_token_ids=(), sampling=params).tokens
    result = scripted(triton, [3, 4], plain, 0.7, 2, params, max_new_tokens=4)
    assert result.tokens == plain


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_illegal_logits_raise(poison):
    target = random_target(1, num_hidden_layers=4)

    def spoil(ids, scores):
        return torch.full_like(scores, poison)

    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature, seed=0, logits_processors=[spoil])
        with pytest.raises(FloatingPointError, match="no token can be chosen for position 2"):
            generate(target, [1, 2], 4, sampling=params)


BAD = [
    ({"temperature": -0.1}, r"temperature: must be in \[0, inf\], got -0.1"),
    ({"temperature": float("nan")}, "temperature: must be a finite number, got nan"),
    ({"temperature": "1"}, "temperature: must be a finite number"),
    ({"top_k": -2}, "top_k: must be an integer"),
    ({"top_k": 2.0}, "top_k: must be an integer"),
    ({"top_p": 0.0}, r"top_p: must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.1}, "top_p: must be in"),
    ({"min_p": -0.1}, "min_p: must be in"),
    ({"repetition_penalty": 0}, "repetition_penalty: must be in"),
    ({"presence_penalty": 2.5}, "presence_penalty: must be in"),
    ({"frequency_penalty": -3}, "frequency_penalty: must be in"),
    ({"seed": 2**63}, "seed: must be an integer"),
    ({"seed": 1.5}, "seed: must be an integer"),
    ({"min_tokens": -1}, "min_tokens: must be an integer"),
    ({"max_tokens": 0}, "max_tokens: must be an integer"),
    ({"max_tokens": 3, "min_tokens": 4}, "max_tokens: must be an integer in"),
    ({"stop": [""]}, "stop: must be non-empty strings"),
    ({"bad_words_ids": [[]]}, "bad_words_ids: must be non-empty"),
    ({"logit_bias": {1: 101}}, r"logit_bias\[1\]: must be in"),
    ({"logits_processors": [3]}, "logits_processors: must be callable"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_rejects_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_rejects_ids_outside_the_vocabulary_and_no_limit():
    target = random_target(1, num_hidden_layers=4)
    for settings in ({"logit_bias": {VOCAB: 1}}, {"bad_words_ids": [[1, VOCAB]]},
                     {"stop_token_ids": [VOCAB]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"ids must lie in 0\.\.31"):
            generate(target, [1], 4, sampling=SamplingParams(**settings))
    with pytest.raises(ValueError, match="max_new_tokens: give it, or max_tokens"):
        generate(target, [1])


def test_tiny_temperature_is_greedy():
    target = random_target(1, num_hidden_layers=4)
    greedy = generate(target, [1, 2], 9, eos_token_ids=()).tokens
    for temperature in (1e-30, 1e-6):
        params = SamplingParams(temperature, seed=1)
        assert generate(target, [1, 2], 9, eos_token_ids=(), sampling=params).tokens == greedy
