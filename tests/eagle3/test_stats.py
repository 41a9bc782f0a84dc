"""Acceptance as counted over rounds, of equal and of different length."""

import random
from itertools import accumulate
from operator import mul

import pytest

from aerie.eagle3.stats import Stats


def count(*rounds: tuple[int, int]) -> Stats:
    """Stats of rounds of (drafted, accepted) tokens."""
    stats = Stats()
    for drafted, accepted in rounds:
        stats.count_draft(drafted, accepted)
    return stats


def test_nothing_counted():
    stats = Stats()
    assert stats.acceptance_length == 1
    assert stats.acceptance_per_position == stats.conditional_acceptance_per_position == []
    assert stats.tokens_per_second == 0


def test_rounds_without_drafts_are_passes_only():
    stats = count((0, 0), (0, 0))
    assert (stats.num_target_passes, stats.num_drafts, stats.num_draft_tokens) == (2, 0, 0)
    assert stats.acceptance_length == 1


def test_positions():
    stats = count((3, 0), (3, 1), (3, 3), (3, 1))
    assert (stats.num_target_passes, stats.num_drafts, stats.num_draft_tokens) == (4, 4, 12)
    assert stats.num_accepted_tokens == 5
    assert stats.acceptance_length == 1 + 5 / 4
    assert stats.acceptance_per_position == [3 / 4, 1 / 4, 1 / 4]
    assert stats.conditional_acceptance_per_position == [3 / 4, 1 / 3, 1]


def test_position_that_was_never_reached():
    assert count((3, 0), (3, 0)).conditional_acceptance_per_position == [0, 0, 0]


@pytest.mark.parametrize("rounds", [((4, 4), (1, 1)), ((1, 1), (4, 4))], ids=str)
def test_a_shorter_round_says_nothing_of_later_positions(rounds):
    stats = count(*rounds)
    assert stats.acceptance_per_position == [1.0] * 4
    assert stats.conditional_acceptance_per_position == [1.0] * 4
    assert stats.acceptance_length == 1 + 5 / 2


def test_rounds_of_different_length():
    stats = count((4, 2), (2, 2), (1, 0), (3, 3), (0, 0))
    assert stats.acceptance_per_position == [3 / 4, 1, 1 / 2, 0]
    assert stats.conditional_acceptance_per_position == [3 / 4, 1, 1 / 2, 0]
    assert stats.acceptance_length == 1 + 7 / 4


@pytest.mark.parametrize("length", range(1, 9))
def test_acceptance_length_from_conditional_acceptances(length):
    """AL = 1 + sum over i of the product of the conditional acceptances up to i."""
    choose = random.Random(length)
    stats = count(*[(length, choose.randint(0, length)) for _ in range(50)])
    products = list(accumulate(stats.conditional_acceptance_per_position, mul))
    assert products == pytest.approx(stats.acceptance_per_position)
    assert stats.acceptance_length == pytest.approx(1 + sum(products))


@pytest.mark.parametrize(
    ("drafts", "accepted", "is_dead"),
    [(31, 0, False), (32, 0, True), (32, 6, True), (32, 7, False), (320, 63, True)],
)
def test_the_floor(drafts, accepted, is_dead):
    """Below 0.2 of the first drafted tokens, after 32 drafts."""
    stats = Stats()
    for draft in range(drafts):
        stats.count_draft(4, int(draft < accepted))
    assert stats.is_at_the_floor == is_dead


def test_no_drafts_are_no_dead_draft():
    stats = Stats()
    for _ in range(40):
        stats.count_draft(0, 0)
    assert not stats.is_at_the_floor


def test_acceptance_of_several_together():
    parts = [Stats(num_tokens=4), Stats(num_tokens=3), Stats()]
    parts[0].count_draft(3, 2)
    parts[0].count_draft(3, 0)
    parts[1].count_draft(2, 2)
    both = Stats.of_all(parts)
    assert (both.num_tokens, both.num_drafts, both.num_target_passes) == (7, 3, 3)
    assert both.acceptance_per_position == [2 / 3, 2 / 3, 0.0]
    assert both.acceptance_length == 1 + 4 / 3
    assert Stats.of_all([]).acceptance_per_position == []


class Clock:
    """Goes on when it is told to: a busy machine's sleeps take as long as they like."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def pass_ms(self, milliseconds: float) -> None:
        self.seconds += 1e-3 * milliseconds


def test_rounds_add_up_to_the_totals(monkeypatch):
    stats, clock = Stats(), Clock()
    monkeypatch.setattr("aerie.eagle3.stats.time", clock)
    with stats.timed("total"), stats.timed("prefill"):
        clock.pass_ms(2)
    for accepted in (2, 0):
        with stats.timed("total"):
            with stats.timed("draft"):
                clock.pass_ms(1 + accepted)
            with stats.timed("verify"):
                clock.pass_ms(2)
            clock.pass_ms(0.5)
            stats.count_draft(3, accepted)
    assert [(one.num_drafted, one.num_accepted) for one in stats.rounds] == [(3, 2), (3, 0)]
    for part in ("draft_ms", "verify_ms"):
        assert sum(getattr(one, part) for one in stats.rounds) == pytest.approx(
            getattr(stats, part)
        )
    assert [one.draft_ms for one in stats.rounds] == pytest.approx([3, 1])
    assert [one.other_ms for one in stats.rounds] == pytest.approx([0.5, 0.5])
    assert stats.other_ms == pytest.approx(1)
