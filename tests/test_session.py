"""A text continued turn by turn is the text decoded at once, id by id, in float32.

Regimes: chains, trees and plain decoding, greedy and sampled with rules; turns that end inside a
burst, at an end token, at the limit or by being closed; turns over chunk edges, rings of chunked
layers and prefill passes; images; empty turns; what is in the draft's cache, and what runs again.
"""

import random

import pytest
import torch

from aerie.eagle3.generate import generate
from aerie.eagle3.policies import Chain
from aerie.eagle3.session import Session
from aerie.llama4.image_features import ImageFeatures
from tests.test_lossless import CONTEXT, VOCAB, random_draft, random_prompt, random_target
from tests.test_policies import random_policy
from tests.test_sampled_lossless import random_params


@pytest.mark.parametrize("block", range(3))
def test_turns_are_one_text(block):
    """3 x 4 sessions of 4 turns."""
    choose = random.Random(block)
    target = random_target(block, num_hidden_layers=4)
    draft = random_draft(block, target)
    for number in range(4):
        policy = random_policy(choose)
        helper = choose.choice([draft, draft, None])
        session = Session(target, CONTEXT, helper, policy=policy)
        text: list[int] = []
        for turn in range(4):
            new = (
                random_prompt(choose.getrandbits(30))[:25]
                if turn == 0 or choose.random() < 0.8
                else []
            )
            params, ends = random_params(choose), (choose.randrange(VOCAB),)
            count = choose.randint(1, 10)
            whole = generate(target, text + new, count, eos_token_ids=ends, sampling=params)
            found = session.generate(new, count, ends, sampling=params)
            assert found.tokens == whole.tokens, f"{block}, {number}, {turn}, {policy}, {params}"
            assert found.finish_reason == whole.finish_reason
            text += new + found.tokens
            assert session.tokens == text


def test_rings_and_prefill_passes(monkeypatch):
    for module in ("engine", "rows"):
        monkeypatch.setattr(f"aerie.eagle3.{module}.PREFILL_ROWS", 70)
    target = random_target(3, context=900, num_hidden_layers=4)
    draft = random_draft(3, target)
    session, text = Session(target, 800, draft), []
    assert len(session._place._rows.cache.pools) == 2  # one of them recycles its pages
    for turn, count in enumerate((150, 1, 90, 200)):
        new = [(7 * i + turn) % VOCAB for i in range(count)]
        found = session.generate(new, 30, ())
        assert found.tokens == generate(target, text + new, 30, eos_token_ids=()).tokens
        text += new + found.tokens


def test_a_turn_runs_what_is_new():
    target = random_target(4, num_hidden_layers=4)
    draft = random_draft(4, target)
    session, seen = Session(target, CONTEXT, draft, policy=Chain(3)), []
    forward = type(target).forward

    def recorded(self, ids, *others, **named):
        seen.append(len(ids))
        return forward(self, ids, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(target), "forward", recorded)
        session.generate([1, 2, 3] * 20, 9, ())
        session.generate([4, 5], 1, ())
    assert seen[0] == 60
    assert 2 < seen[-1] <= 2 + 4 + 1  # the last round's rows, its bonus token, and the new ones


def test_the_draft_s_cache_is_that_of_one_pass():
    """Rows behind a turn's end were seen with the token that followed, not with one cut off."""
    target = random_target(5, num_hidden_layers=4)
    draft = random_draft(5, target)
    turns, whole = (Session(target, 60, draft, policy=Chain(3)) for _ in range(2))
    turns.generate([1, 2, 3, 4], 9, ())
    turns.generate([5, 6], 1, ())
    text = turns.tokens[:-1]
    whole.generate(text, 1, ())
    rows = len(text) - 1
    for name in ("k_LRCGK", "v_LRCGK"):
        ours, expected = (
            getattr(one._place._rows.caches[1].pools[0], name)[0, 0, :rows]
            for one in (turns, whole)
        )
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_closed_turn_can_be_continued():
    target = random_target(6, num_hidden_layers=4)
    for helper in (random_draft(6, target), None):
        session = Session(target, CONTEXT, helper)
        stream = session.stream([1, 2, 3], 40, ())
        bursts = iter(stream)
        begun = [token for _ in range(3) for token in next(bursts)]
        assert session.tokens == [1, 2, 3, *begun]
        found = session.generate([7], 20, ())  # ends the turn before it
        expected = generate(target, [1, 2, 3, *begun, 7], 20, eos_token_ids=())
        assert found.tokens == expected.tokens


@pytest.mark.parametrize("is_begun", [True, False])
def test_images_stay_with_the_text(is_begun):
    """An image's last row runs again behind a turn of one token; a turn may not have begun."""
    target = random_target(8, num_hidden_layers=4)
    picture = ImageFeatures(tuple(range(2, 8)), torch.randn(6, target.config.hidden_size))
    for helper in (random_draft(8, target), None):
        session = Session(target, CONTEXT, helper)
        first = session.stream([1, 2, *[9] * 6], 1, (), images=picture)
        if is_begun:
            assert len(list(first)) == 1
        text = [*session.tokens, 3, *[9] * 6]
        other = ImageFeatures(tuple(range(1, 7)), picture.rows_FD.flip(0))
        found = session.generate(text[-7:], 12, (), images=other)
        both = picture.followed_by(other.moved(len(text) - 7))
        expected = generate(target, text, 12, eos_token_ids=(), images=both)
        assert found.tokens == expected.tokens


def test_too_long_a_turn_is_refused_and_changes_nothing():
    target = random_target(7, num_hidden_layers=4)
    session = Session(target, 20)
    first = session.generate([1, 2, 3], 5, ())
    with pytest.raises(
        ValueError, match="max_length: text, prompt and output of this turn take 21"
    ):
        session.generate([1] * 5, 8, ())
    assert session.tokens == [1, 2, 3, *first.tokens]
    found = session.generate([1] * 5, 7, ())
    assert (
        found.tokens
        == generate(target, [1, 2, 3, *first.tokens, *[1] * 5], 7, eos_token_ids=()).tokens
    )
