"""Cost-aware width: the choice against brute force, what it learns, cut trees, refused tables.

That the ids stay those of plain decoding is in tests/test_policies.py, what the choice is worth in
tests/test_width_simulation.py.
"""

import random
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from aerie.eagle3 import cost_measurement
from aerie.eagle3.batch import Committed
from aerie.eagle3.batch_costs import BatchCosts
from aerie.eagle3.cost_aware import CostAware, CostAwareDrafter
from aerie.eagle3.cost_measurement import measured_costs
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.eagle3.tree import DraftTree, best_part, chain, fixed_tree
from aerie.eagle3.width import Experience, RoundCosts, worth_deepening, worth_verifying
from aerie.llama4.step import Tree
from tests.test_lossless import random_draft, random_target

LINEAR = RoundCosts({rows: 1.0 + rows for rows in range(1, 65)}, 0.5)


def falling(choose: random.Random, count: int) -> list[float]:
    return sorted((choose.random() for _ in range(count)), reverse=True)


@pytest.mark.parametrize("seed", range(40))
def test_count_is_the_best_of_all_counts(seed):
    choose = random.Random(seed)
    sizes = sorted({1, *choose.sample(range(2, 40), 8), 40})
    costs = RoundCosts({size: choose.uniform(1, 20) for size in sizes})
    gains, rate, batch = falling(choose, 20), choose.uniform(0.05, 1), choose.randint(1, 8)

    def value(count: int) -> float:
        return sum(gains[:count]) - rate * costs.verify(batch + count)

    chosen = worth_verifying(gains, costs, rate, batch)
    assert value(chosen) == pytest.approx(max(value(count) for count in range(21)))


def test_count_fills_its_size_class():
    steps = RoundCosts({1: 1.0, 4: 2.0, 8: 3.0})
    assert steps.verify(3) == steps.verify(4) == 2.0
    assert worth_verifying([0.5] * 3, steps, 0.1) == 3
    assert worth_verifying([0.9, 0.9, 0.9, 0.01, 0.01], steps, 0.5) == 3
    assert worth_verifying([0.9] * 30, steps, 0.1) == 7  # more than 8 rows are never verified


def test_what_costs_nothing_is_verified_and_what_costs_much_is_not():
    flat = RoundCosts({1: 1.0, 9: 1.0})
    assert worth_verifying([0.01] * 8, flat, 1.0) == 8
    assert worth_verifying([0.99] * 8, RoundCosts({1: 1.0, 9: 100.0}), 1.0) == 0


def test_the_larger_the_batch_the_wider():
    """A concave table: the roots of a large batch touch all experts, so that nodes are free."""
    table = RoundCosts({rows: 16 * (1 - (15 / 16) ** rows) + 3 for rows in range(1, 600)})
    share = [
        worth_verifying(sorted([0.25, 0.2, 0.15, 0.1] * batch, reverse=True), table, rate, batch)
        / batch
        for batch, rate in ((1, 0.3), (64, 4.0))
    ]
    assert share == [0, 4]


def test_deepens_where_some_further_level_pays():
    gains = [0.9]
    for draft_ms, expected in ((0.1, True), (50.0, False)):
        costs = RoundCosts(LINEAR.verify_ms, draft_ms)
        assert worth_deepening(gains, gains, 4, 0.9, costs, 0.3) == expected
    assert not worth_deepening(gains, gains, 0, 0.9, LINEAR, 0.3)
    jump = RoundCosts({1: 1.0, 2: 1.1, 5: 3.0})  # one level more is not worth it, three are
    assert not worth_deepening(gains, gains, 1, 1.0, jump, 1.0)
    assert worth_deepening(gains, gains, 3, 1.0, jump, 1.0)


@pytest.mark.parametrize("exponent", [0.4, 1.0])
def test_experience_finds_how_far_to_trust_the_draft(exponent):
    choose, experience = random.Random(1), Experience(LINEAR)
    for _ in range(400):
        chances = falling(choose, 3)
        uniform = choose.random()  # one path: deeper nodes are accepted with the ones above
        accepted = sum(uniform < p**exponent for p in chances)
        experience.observe(chances, chances, accepted)
    assert experience.exponent == pytest.approx(exponent, abs=0.1)
    assert experience.gain(0.25) == 0.25**experience.exponent


def test_rate_is_tokens_over_the_table_s_time():
    experience = Experience(LINEAR)
    assert experience.rate == 1 / 2.0  # plain decoding
    experience.observe([0.5, 0.25], [0.5, 0.25, 0.1], num_accepted=1)
    assert experience.rate == 2 / (LINEAR.verify(3) + 3 * 0.5)
    before = experience.fall
    experience.observe([0.5], [0.9, 0.09, 0.009], num_accepted=0)
    assert experience.fall < before


def tree(seed: int) -> DraftTree:
    choose, parents, scores = random.Random(seed), [-1], [0.0]
    for row in range(1, 20):
        parents.append(choose.randrange(row))
        scores.append(scores[parents[-1]] - choose.choice([0.0, 0.5, 1.0, 2.0]))
    return fixed_tree(torch.arange(100, 119)[None], tuple(parents), torch.tensor([scores[1:]]))


def parents_of(tree: DraftTree) -> list[int]:
    return tree.shape.parents_N.view(-1).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_best_part_keeps_ancestors_and_the_best(seed):
    whole = tree(seed)
    assert whole.scores_BN is not None
    parents = parents_of(whole)
    for count in range(20):
        part = best_part(whole, count, whole.depth)
        kept = [token - 99 for token in part.tokens_BN[0].tolist()]
        assert all(parents[row] in (0, *kept) for row in kept)
        dropped = [row for row in range(1, 20) if row not in kept]
        score = whole.scores_BN[0].tolist()
        worst = min((score[row - 1] for row in kept), default=0.0)
        assert all(score[row - 1] <= worst for row in dropped)
        above = parents_of(part)[1:]
        assert [([0, *kept])[parent] for parent in above] == [parents[row] for row in kept]


class Guesses:
    """An inner drafter of given scores, asked as a real one is."""

    tap_layers = ()
    cache = None

    def __init__(self, goes_on, scores: list[float]) -> None:
        self.goes_on, self.scores, self.drafted = goes_on, torch.tensor([scores]), []

    def propose(self, committed: Committed) -> DraftTree:
        depth, sequences = 1, len(committed.lengths_B)
        scores = self.scores.expand(sequences, -1)
        while depth < scores.shape[1] and self.goes_on(scores[:, depth - 1 : depth]):
            depth += 1
        self.drafted.append(depth)
        return chain(torch.arange(depth).expand(sequences, -1), scores[:, :depth])


def behind(start: int, *counts: int) -> Committed:
    """Sequences that have just committed `counts` rows from `start` on."""
    counts_B = torch.tensor(counts)
    starts_B = torch.full_like(counts_B, start)
    return Committed(starts_B, counts_B, starts_B + counts_B, counts_B[:, None], ())


def drafting(scores: list[float], costs: RoundCosts | BatchCosts) -> Any:
    return CostAwareDrafter(
        lambda goes_on: Guesses(goes_on, scores), costs, len(scores), len(scores)
    )


def width(drafter, committed: Committed) -> int:
    return drafter.propose(committed).tokens_BN.shape[1]


def test_a_sure_draft_goes_deep_and_an_unsure_one_is_not_verified():
    costs = RoundCosts({rows: 4.0 + rows for rows in range(1, 65)}, 0.3)
    sure = drafting([-0.01 * i for i in range(1, 9)], costs)
    unsure = drafting([-6.0 * i for i in range(1, 9)], RoundCosts({1: 1.0, 9: 9.0}, 0.5))
    assert width(sure, behind(0, 1)) == sure.inner.drafted[0] == 8
    assert width(unsure, behind(0, 1)) == 0
    assert unsure.inner.drafted == [1]


def test_a_draft_that_keeps_failing_is_verified_less():
    gentle = RoundCosts({rows: 4.0 + 0.3 * rows for rows in range(1, 10)}, 0.1)
    drafter = drafting([-0.3 * i for i in range(1, 9)], gentle)
    widths = [width(drafter, behind(start, 1)) for start in range(62)]  # nothing accepted
    assert widths[-1] < widths[0] / 2


def test_rounds_of_other_sequences_teach_nothing():
    """A row whose start is not where the last round stood is another sequence's."""
    drafter = drafting([-0.3 * i for i in range(1, 9)], LINEAR)
    drafter.propose(behind(0, 1))
    rate = drafter.experience.rate
    drafter.propose(behind(40, 1))
    assert drafter.experience.rate == rate
    drafter.propose(behind(41, 1))
    assert drafter.experience.rate != rate


def test_a_batch_shares_a_width_and_has_its_own_experience():
    costs = RoundCosts({rows: 4.0 + 0.2 * rows for rows in range(1, 65)}, 0.1)
    drafter = drafting([-0.3 * i for i in range(1, 9)], costs)
    alone = drafter.propose(behind(0, 1)), drafter.experience
    together = drafter.propose(behind(0, 1, 1, 1)), drafter.experience
    assert alone[1] is not together[1]
    assert together[0].tokens_BN.shape[0] == 3
    assert 1 <= together[0].tokens_BN.shape[1] <= 8
    beyond = drafting([-6.0] * 8, RoundCosts({1: 1.0, 9: 9.0}))
    assert width(beyond, behind(0, *[1] * 10)) == 8


def test_nan_scores_are_worth_nothing():
    """... and are sorted on the host as on the device, so that a kept node has its ancestors."""
    assert width(drafting([float("nan")] * 8, LINEAR), behind(0, 1)) == 0
    whole, free = tree(3), RoundCosts({1: 1.0, 9: 1.0})
    assert whole.scores_BN is not None
    scores_BN = whole.scores_BN.clone()
    scores_BN[:, ::4] = torch.nan
    drafter = drafting([0.0] * 9, free)
    drafter.inner.propose = lambda _: replace(whole, scores_BN=scores_BN)
    part = drafter.propose(behind(0, 1))
    assert part.tokens_BN.shape[1] == 8
    assert max(Tree(tuple(parents_of(part))).depths()) <= part.depth


@pytest.mark.parametrize(("num_rows", "most"), [(1, 1), (9, 1), (63, 1), (4, 5)])
def test_costs_are_measured_in_time(num_rows, most):
    target = random_target(0, num_hidden_layers=4)
    draft = random_draft(0, target)
    start = time.perf_counter()
    costs = measured_costs(target, draft, num_rows, most)
    assert time.perf_counter() - start < 2
    assert list(costs.tables) == [n for n in (1, 2, 4, 5) if n <= most]
    for table in costs.tables.values():
        assert table.sizes[0] == 1
        assert table.sizes[-1] == num_rows + 1
        times = [table.verify_ms[size] for size in table.sizes]
        assert times == sorted(times)
        assert table.draft_level_ms > 0
    policy = SpeculativeConfig.from_dict({"cost_aware_width": "measured"}).policy_on(target, draft)
    assert isinstance(policy, CostAware)
    alone = policy.costs.for_rounds(1, 5)
    assert alone is not None
    assert alone.sizes[-1] == 5


class FakeClock:
    """Time that passes where a pass says so, and nowhere else."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def after(self, ms: float) -> None:
        self.seconds += 1e-3 * ms


def measured_by(clock: FakeClock, monkeypatch, verify_ms, num_rows: int, most: int) -> BatchCosts:
    """Of passes that take what `verify_ms(sequences, rows)` says, a level of the draft a fifth of
    plain decoding, and every first pass a millisecond more."""
    seen = set()

    def run(sequences: int, rows: int) -> None:
        first = (sequences, rows) not in seen
        seen.add((sequences, rows))
        clock.after(verify_ms(sequences, max(1, rows)) * (1.0 if rows else 0.2) + first)

    monkeypatch.setattr(cost_measurement, "_verify_passes", lambda *_: run)
    monkeypatch.setattr(cost_measurement, "_draft_levels", lambda *_: lambda n: run(n, 0))
    target = random_target(0, num_hidden_layers=4)
    return measured_costs(target, random_draft(0, target), num_rows, most, clock)


def experts(sequences: int, rows: int) -> float:
    """A pass that reads the experts its rows ask for: the second row costs, the tenth hardly."""
    return 4.0 + 16 * (1 - (15 / 16) ** (sequences * rows))


def test_every_number_of_sequences_has_its_own_times(monkeypatch):
    clock = FakeClock()
    costs = measured_by(clock, monkeypatch, experts, 4, 8)
    assert list(costs.tables) == [1, 2, 4, 8]
    for sequences, table in costs.tables.items():
        assert table.draft_level_ms == pytest.approx(0.2 * experts(sequences, 1))
        for rows in range(1, 6):
            assert table.verify_ms[rows] == pytest.approx(experts(sequences, rows))
    assert clock.seconds < 2


@pytest.mark.parametrize("ms", [40.0, 200.0, 900.0])
def test_what_takes_too_long_is_left_out(ms, monkeypatch):
    """Of a target that is slow for its size: never more than one pass over the budget, but for the
    three without which there is no table at all."""
    clock = FakeClock()
    costs = measured_by(clock, monkeypatch, lambda *_: ms, 20, 8)
    least = 2.2 * ms / 1e3 + 0.003
    assert clock.seconds <= max(cost_measurement.BUDGET_S + ms / 1e3 + 0.002, least)
    alone = costs.tables[1]
    assert (alone.sizes[0], alone.sizes[-1]) == (1, 21)
    assert alone.sizes == (1, 21) or ms == 40.0
    assert (costs.for_rounds(8, 21) is not None) == (ms == 40.0)


def test_tables_for_rounds():
    small, large = RoundCosts({1: 1.0, 5: 2.0}, 0.1), RoundCosts({1: 3.0, 5: 7.0}, 0.3)
    costs = BatchCosts({1: small, 4: large})
    assert costs.for_rounds(1, 5) == small
    for sequences in (2, 4):  # two are a round of four, filled up
        found = costs.for_rounds(sequences, 5)
        assert found is not None
        assert found.verify_ms == {sequences: 3.0, 5 * sequences: 7.0}
        assert found.draft_level_ms == 0.3
        assert worth_verifying([0.9] * 4 * sequences, found, 0.1, sequences) == 4 * sequences
    assert costs.for_rounds(4, 6) is None  # more rows than were timed
    assert costs.for_rounds(5, 5) is None
    assert small.for_rounds(2, 3) is None
    assert small.for_rounds(2, 2) == small


def test_a_round_is_as_wide_as_its_own_table_says():
    """Where one sequence's passes grow with their rows eight sequences' do not, and the reverse."""
    steep = RoundCosts({rows: 1.0 * rows for rows in range(1, 10)}, 0.01)
    flat = RoundCosts(dict.fromkeys(range(1, 10), 20.0), 0.01)
    scores = [-0.7 * i for i in range(1, 9)]
    for tables, is_wide in (({1: steep, 8: flat}, True), ({1: flat, 8: steep}, False)):
        drafter = drafting(scores, BatchCosts(tables))
        alone = width(drafter, behind(0, 1))
        together = width(drafter, behind(0, *[1] * 8))
        assert (together > alone) == is_wide
        assert drafter.costs.num_sequences == 8
        assert width(drafter, behind(0, *[1] * 9)) == 8  # no table: in full


def test_costs_from_the_speculative_config():
    make = SpeculativeConfig.from_dict
    table = {"verify_ms": {"1": 4.0, "4": 7.7}, "draft_level_ms": 0.2}
    assert make({"cost_aware_width": table}).cost_aware_width == RoundCosts({1: 4.0, 4: 7.7}, 0.2)
    assert make({"cost_aware_width": "measured"}).cost_aware_width == "measured"
    tables = {"by_sequences": {"1": table, "8": {"verify_ms": {"1": 5}}}}
    expected = BatchCosts({1: RoundCosts({1: 4.0, 4: 7.7}, 0.2), 8: RoundCosts({1: 5})})
    assert make({"cost_aware_width": tables}).cost_aware_width == expected


BAD = [
    ("fast", 'cost_aware_width: must be "measured" or costs'),
    ({"verify": {}}, 'must be "measured" or {"verify_ms"'),
    ({"verify_ms": [1, 2]}, 'must be "measured" or {"verify_ms"'),
    ({"verify_ms": {"2": 1.0}}, "needs the time of 1 row"),
    ({"verify_ms": {"1": 0}}, r"verify_ms\[1\]: must be milliseconds, got 0"),
    ({"verify_ms": {"1": "5"}}, r"verify_ms\[1\]: must be milliseconds, got '5'"),
    ({"verify_ms": {"one": 5}}, "rows must be integers >= 1, got 'one'"),
    ({"by_sequences": {"2": {"verify_ms": {"1": 5}}}}, "needs tables of 1 sequence and of larger"),
    ({"by_sequences": {"1": {"verify_ms": {"1": 5}}, "x": {"verify_ms": {"1": 5}}}}, "got .1, 'x'"),
    ({"by_sequences": {"1": 5}}, "by_sequences: must be {"),
    ({"by_sequences": {"1": {"verify_ms": {"1": 5}}}, "verify_ms": {}}, "stand alone"),
    ({"by_sequences": {"1": {"verify_ms": {"2": 5}}}}, "needs the time of 1 row, plain decoding"),
    ({"verify_ms": {"1": 5}, "draft_level_ms": -1}, "draft_level_ms: must be milliseconds, got -1"),
]


@pytest.mark.parametrize(("value", "message"), BAD)
def test_rejects_bad_costs(value, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeConfig.from_dict({"cost_aware_width": value})
