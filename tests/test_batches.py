"""Several prompts side by side write what each writes alone, id by id, in float32.

Regimes: more prompts than rows, of unlike lengths (around chunk edges, over several prefill
passes), with their own seeds, samplers, ends and limits, so that they end at different times inside
bursts and others take their rows; chains, trees and plain decoding; rings of chunked layers; little
memory, so that requests wait; cancelling; pages are all free afterwards.
"""

import random

import pytest
import torch

from aerie.eagle3.batch import Batch
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.generate import Decodings, generate
from aerie.eagle3.policies import Chain, StaticTree
from aerie.eagle3.registry import load_draft
from aerie.eagle3.rows import Pair
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Request
from aerie.embedded import DRAFT, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer
from tests.test_lossless import VOCAB, random_draft, random_prompt, random_target
from tests.test_policies import random_policy
from tests.test_sampled_lossless import random_params


@pytest.mark.parametrize("block", range(4))
def test_as_alone(block):
    """4 x 4 batches of 2 to 9 random requests."""
    choose = random.Random(block)
    target = random_target(block, num_hidden_layers=4)
    draft = random_draft(block, target)
    for number in range(4):
        count = choose.randint(2, 9)
        prompts = [random_prompt(choose.getrandbits(30)) for _ in range(count)]
        params = [random_params(choose) for _ in prompts]
        ends = (choose.randrange(VOCAB),)
        policy = random_policy(choose)
        alone = [
            generate(target, prompt, 14, eos_token_ids=ends, sampling=own)
            for prompt, own in zip(prompts, params, strict=True)
        ]
        for helper in (draft, None):
            together = generate(
                target, prompts, 14, helper, eos_token_ids=ends, policy=policy, sampling=params,
                max_batch_size=choose.randint(1, count),
            )  # fmt: skip
            for prompt, expected, found in zip(prompts, alone, together, strict=True):
                assert found.tokens == expected.tokens, f"{block}, {number}, {policy}, {prompt}"
                assert found.finish_reason == expected.finish_reason
                assert found.stats.num_tokens == len(found.tokens)


@pytest.mark.parametrize("seed", range(2))
def test_long_prompts_in_rings_beside_short_ones(seed, monkeypatch):
    """Prompts over several prefill passes are read while others run, in pages used before."""
    for module in ("engine", "rows"):
        monkeypatch.setattr(f"aerie.eagle3.{module}.PREFILL_ROWS", 8)
    target = random_target(seed, context=300, num_hidden_layers=4)
    prompts = [[7 * i % VOCAB for i in range(n)] for n in (150, 3, 40, 170, 1, 90)]
    limits = [SamplingParams(max_tokens=n) for n in (20, 60, 9, 30, 70, 12)]
    alone = [
        generate(target, prompt, eos_token_ids=(), sampling=own).tokens
        for prompt, own in zip(prompts, limits, strict=True)
    ]
    draft = random_draft(seed, target)
    together = generate(target, prompts, None, draft, 3, (), sampling=limits, max_batch_size=3)
    assert [result.tokens for result in together] == alone


def batch_of(target, draft, prompts, count=12, **options) -> Decodings:
    requests = [Request.checked(target, prompt, count, ()) for prompt in prompts]
    return Decodings(Pair(target, draft, Chain(3)), requests, **options)


def test_rows_are_refilled_while_others_run():
    """With room for two, the third prompt starts as soon as the short one has ended."""
    target = random_target(2, num_hidden_layers=4)
    limits = [SamplingParams(max_tokens=n) for n in (2, 30, 30)]
    requests = [Request.checked(target, [1, 2, n], None, (), own) for n, own in enumerate(limits)]
    decodings = Decodings(Pair(target, None, Chain(1)), requests, max_batch_size=2)
    order = [number for number, _ in decodings]
    assert order.index(2) < len(order) / 4
    assert order[-1] == 2
    assert decodings.decoded[1].stats.num_target_passes == 30


@pytest.mark.parametrize("with_draft", [True, False])
def test_pages_are_free_afterwards(with_draft):
    target = random_target(4, num_hidden_layers=4)
    draft = random_draft(4, target) if with_draft else None
    prompts = [random_prompt(seed) for seed in range(7)]
    decodings = batch_of(target, draft, prompts, max_batch_size=3)
    used = [decodings.rows.num_used_pages for _ in decodings]
    assert max(used) == 3 * (2 if with_draft else 1)
    assert decodings.rows.num_used_pages == 0


def test_cancelled_prompts_free_their_pages_and_disturb_nobody():
    target = random_target(5, num_hidden_layers=4)
    draft = random_draft(5, target)
    prompts = [random_prompt(seed) for seed in range(8)]
    alone = [generate(target, prompt, 12, eos_token_ids=()).tokens for prompt in prompts]
    decodings = batch_of(target, draft, prompts, max_batch_size=4)
    for seen, (number, _) in enumerate(decodings):
        if seen == 5:
            decodings.cancel(1)
            decodings.cancel(6)  # still waiting
        assert number != 6
    for number, decoded in enumerate(decodings.decoded):
        if number in (1, 6):
            assert decoded.finish_reason is None
            assert decoded.tokens == alone[number][: len(decoded.tokens)]
            assert len(decoded.tokens) < 12
        else:
            assert decoded.tokens == alone[number]
    assert decodings.rows.num_used_pages == 0


def test_closing_the_iterator_frees_the_pages():
    target = random_target(5, num_hidden_layers=4)
    for decoding in (Decoding(target, [1, 2, 3], 20), batch_of(target, None, [[1], [2], [3]])):
        rows = decoding.decodings.rows if isinstance(decoding, Decoding) else decoding.rows
        bursts = iter(decoding)
        next(bursts)
        assert rows.num_used_pages > 0
        bursts.close()
        assert rows.num_used_pages == 0


def test_requests_wait_for_memory():
    """Room for one page at a time: one prompt after the other, with the same ids."""
    target = random_target(6, num_hidden_layers=4)
    draft = random_draft(6, target)
    prompts = [random_prompt(seed) for seed in range(5)]
    page = sum(
        2 * pool.k_LRCGK[:, :1].nbytes
        for cache in batch_of(target, draft, prompts).rows.caches
        for pool in cache.pools
    )
    alone = [generate(target, prompt, 12, eos_token_ids=()).tokens for prompt in prompts]
    for num_pages in (1, 2, 3):
        small = batch_of(target, draft, prompts, kv_cache_bytes=num_pages * page + page // 2)
        assert small.rows.cache.pools[0].num_pages == num_pages
        assert max(small.rows.num_used_pages for _ in small) == 2 * num_pages
        assert [decoded.tokens for decoded in small.decoded] == alone
    with pytest.raises(ValueError, match="kv_cache_bytes: a request of .* needs 1 pages of 64"):
        batch_of(target, draft, prompts, kv_cache_bytes=page - 1)


def test_bursts_say_what_was_accepted():
    target = random_target(7, num_hidden_layers=4)
    draft = random_draft(7, target)
    decoding = Decoding(target, [3, 1, 4], 40, draft, eos_token_ids=())
    first, *bursts = decoding
    assert (len(first), first.num_accepted) == (1, 0)
    assert all(len(burst) == burst.num_accepted + 1 for burst in bursts[:-1])
    accepted = sum(burst.num_accepted for burst in bursts)
    assert 0 <= decoding.stats.num_accepted_tokens - accepted <= 4  # the last burst is cut


@pytest.mark.parametrize("legal", [0, 3])
def test_bad_logits_end_their_prompt_and_no_other(legal):
    """From the token behind `legal` ones on; tokens before it are the prompt's own."""
    target = random_target(1, num_hidden_layers=4)
    draft = random_draft(1, target)
    prompts = [[1, 2], [5, 6, 7], [3]]
    expected = generate(target, prompts, 9, eos_token_ids=())

    def spoil(ids, scores):
        known_B1 = torch.full((len(ids), 1), len(ids[0]) < len(prompts[1]) + legal)
        return scores.where(known_B1, torch.nan)

    samplings = [SamplingParams()] * 3
    samplings[1] = SamplingParams(logits_processors=[spoil])
    for helper in (draft, None):
        found = generate(target, prompts, 9, helper, 2, (), sampling=samplings)
        assert [one.finish_reason for one in found] == ["length", "error", "length"]
        assert found[1].tokens == expected[1].tokens[:legal]
        assert f"chosen for position {3 + legal}: the target's logits" in str(found[1].error)
        assert found[0].tokens == expected[0].tokens
        assert found[2].tokens == expected[2].tokens
        assert found[0].error is found[2].error is None
    requests = [Request.checked(target, prompts[1], 4, (), samplings[1])]
    decodings = Decodings(Pair(target, None, Chain(1)), requests)
    list(decodings)
    assert decodings.rows.num_used_pages == 0


def test_an_end_within_a_run_comes_before_bad_logits_behind_it():
    target = random_target(1, num_hidden_layers=4)
    draft = random_draft(1, target)
    plain = generate(target, [1, 2], 6, eos_token_ids=()).tokens

    def spoil(ids, scores):
        return scores.where(torch.tensor(len(ids[0]) < 2 + 4), torch.nan)

    bad = SamplingParams(logits_processors=[spoil])
    for helper in (draft, None):
        ended = generate(target, [1, 2], 9, helper, 3, (plain[3],), sampling=bad)
        assert ended.finish_reason == "eos"
        assert ended.tokens == plain[: plain.index(plain[3]) + 1]


def test_lists_must_fit_the_prompts():
    target = random_target(1, num_hidden_layers=4)
    with pytest.raises(ValueError, match="sampling: one for each of 2 prompts, got 1"):
        generate(target, [[1], [2]], 4, sampling=[SamplingParams()])
    with pytest.raises(ValueError, match="max_batch_size: at least 1"):
        generate(target, [[1], [2]], 4, max_batch_size=0)
    assert len(generate(target, [[1], [2]], 4)) == 2


def test_triton_backend():
    """Strided columns, row starts and paths of several sequences, in the interpreted kernels."""
    eager, triton = (random_target(9, kind, num_hidden_layers=4) for kind in ("eager", "triton"))
    prompts = [[3, 4], [5], [6, 7, 8]]
    expected = [generate(eager, prompt, 4, eos_token_ids=()).tokens for prompt in prompts]
    tree = StaticTree([[0], [1], [1, 0]])
    draft = random_draft(9, triton)
    for policy in (Chain(1), tree):
        found = generate(triton, prompts, 4, draft, eos_token_ids=(), policy=policy)
        assert [result.tokens for result in found] == expected


def test_drafts_are_those_of_each_prompt_alone():
    """Or ids would still be right, and acceptance worse: rows move while others end."""
    target = Llama4ForCausalLM.from_pretrained(TARGET)
    draft = load_draft(DRAFT, target)
    tokenizer = load_tokenizer(TARGET)
    texts = ("def f(x):", "The with statement", "A class", "import os", "for i in range(", "Note")
    prompts = [tokenizer.encode(text).ids for text in texts]
    limits = [SamplingParams(max_tokens=9 + 6 * n) for n in range(len(texts))]
    alone = [
        generate(target, prompt, None, draft, 4, (), sampling=own)
        for prompt, own in zip(prompts, limits, strict=True)
    ]
    together = generate(target, prompts, None, draft, 4, (), sampling=limits, max_batch_size=3)
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    accepted = [
        sum(result.stats.num_accepted_tokens for result in results) for results in (alone, together)
    ]
    assert accepted[0] > 40
    assert abs(accepted[0] - accepted[1]) <= 2  # the draft's sums may round differently


def test_a_row_moves_whole():
    """A column left behind would cost acceptance only, and show nowhere else."""
    batch = Batch(3, 9, 4, 2, 5, torch.float32, torch.device("cpu"))
    columns = [*batch.taps_BPD, *(x for x in vars(batch).values() if isinstance(x, torch.Tensor))]
    assert len(columns) == 9
    for column in columns:
        column.copy_(torch.arange(column.numel()).view(column.shape) + 1)
    before = [column[2].clone() for column in columns]
    batch.move(2, 0)
    for column, row in zip(columns, before, strict=True):
        assert torch.equal(column[0], row)
    assert batch.lengths_B.tolist()[2] == batch.is_running_B.tolist()[2] == 0
