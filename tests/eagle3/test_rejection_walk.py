"""Rejection down the trees of a batch: the proven rule at every step, and chi-square of what comes
out, drafts drawn by the real code. Controls break one thing each and must fail by far.

Every case has 20,000 sequences that differ in nothing but their seed: tables of p and q by prefix
stand for target and draft. The joint of two tokens is tested, so a second token that is right by
itself and wrong given the first would show.
"""

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from aerie.eagle3 import rejection
from aerie.eagle3.noise import coins, derived_seeds
from aerie.eagle3.rejection import Drawn, Uniforms, choose, walk
from aerie.eagle3.sampled_drafts import drawn_siblings
from aerie.kernels.draw import draw_ref
from aerie.kernels.row_filter import row_filter_ref

V, COUNT, ROOT = 4, 20_000, 10  # vocabulary, sequences, position of the root
LIMIT = 57.0  # chi-square of 15 degrees of freedom, alpha 1e-6
TREES = {  # children of every row, in drawn order
    "chain of one": [[1], []],
    "chain of two": [[1], [2], []],
    "chain of three": [[1], [2], [3], []],
    "two siblings": [[1, 2], [], []],
    "tree": [[1, 2], [3, 4], [5], [], [], []],
}


def table(seed: int, scale: float) -> Tensor:
    """Logits behind the root and behind each first token, [1 + V, V]; further on the latter."""
    return torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed)) * scale


def pick(seeds_B: Tensor, left_BV: Tensor, positions_B: Tensor) -> Tensor:
    logits_BV = left_BV.log()
    return draw_ref(logits_BV, row_filter_ref(logits_BV, torch.ones(len(seeds_B))), seeds_B,
                    positions_B)  # fmt: skip


def joint(p_logits: Tensor, q_logits: Tensor, children, *, told=1.0, greedy=False) -> Tensor:
    """Counts [V, V] of the first two tokens of all sequences. `told`: the temperature that
    verification is told instead of that of the draft, 1; `greedy`: drafts are not drawn."""
    seeds_B, rows = torch.arange(COUNT), len(children)
    tokens_BN = torch.zeros(COUNT, rows, dtype=torch.int64)
    depths, ranks, contexts_BN = [0] * rows, [0] * rows, tokens_BN.clone()
    probs_BNV = torch.zeros(COUNT, rows, V)
    for row, nodes in enumerate(children):
        behind_BV = q_logits[contexts_BN[:, row]]
        positions_B = torch.full((COUNT,), ROOT + depths[row] + 1)
        heat_B = torch.full((COUNT,), 0.0 if greedy else 1.0)
        siblings = drawn_siblings(behind_BV, heat_B, seeds_B, positions_B, len(nodes))
        probs_BNV[:, row] = (behind_BV / told).softmax(-1)
        for rank, node in enumerate(nodes):
            tokens_BN[:, node] = siblings.ids_RA[:, rank]
            contexts_BN[:, node] = 1 + tokens_BN[:, node]
            depths[node], ranks[node] = depths[row] + 1, rank
    widest = max(len(nodes) for nodes in children)
    children_NS = torch.tensor([nodes + [-1] * (widest - len(nodes)) for nodes in children])
    positions_BN = (ROOT + torch.tensor(depths)).expand(COUNT, -1)

    def p_of_rows(row_B: Tensor) -> Tensor:
        return p_logits[contexts_BN.gather(1, row_B[:, None])[:, 0]].softmax(-1)

    found = walk(
        p_of_rows,
        tokens_BN,
        Drawn(children_NS, torch.tensor(ranks), probs_BNV, torch.arange(V)),
        coins(seeds_B, positions_BN, torch.tensor(ranks)),
        lambda left_BV, level_B: pick(seeds_B, left_BV, ROOT + level_B),
        max(depths),
    )
    first_B = found[:, 0]
    second_B = pick(seeds_B, p_logits[1 + first_B].softmax(-1), torch.full((COUNT,), ROOT + 2))
    for node in children[0]:  # an accepted node has the second token behind it
        second_B = torch.where(tokens_BN[:, node] == first_B, found[:, node], second_B)
    return (first_B * V + second_B).bincount(minlength=V * V)


def chi_square(counts: Tensor, p_logits: Tensor) -> float:
    expected = p_logits[0].softmax(0)[:, None] * p_logits[1:].softmax(-1) * COUNT
    return float(((counts - expected.flatten()) ** 2 / expected.flatten()).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", TREES)
def test_joint_of_two_tokens(shape, seed):
    p_logits, q_logits = table(seed, 1.0), table(100 + seed, 1.5)
    assert chi_square(joint(p_logits, q_logits, TREES[shape]), p_logits) < LIMIT


@pytest.mark.parametrize(
    "broken", ["residual", "softmax q", "sibling twice", "temperature", "shared noise"]
)
def test_controls_fail(broken, monkeypatch):
    p_logits, q_logits, options = table(0, 1.0), table(100, 1.5), {}
    shape = TREES["two siblings" if broken == "sibling twice" else "chain of one"]
    if broken == "residual":
        monkeypatch.setattr(rejection, "residual", lambda p_V, q_V: p_V)
    elif broken == "softmax q":
        options = {"greedy": True}
    elif broken == "sibling twice":  # the second is judged as if the first had not been drawn
        monkeypatch.setattr(rejection, "without", lambda q_V, token: q_V)
    elif broken == "temperature":
        options = {"told": 1.5}
    else:
        for module in ("sampled_drafts", "noise"):
            name = f"aerie.eagle3.{module}.derived_seeds"
            monkeypatch.setattr(name, lambda seeds_B, use: seeds_B)
    counts = joint(p_logits, q_logits, shape, **options)
    assert chi_square(counts, p_logits) > 2 * LIMIT


@pytest.mark.parametrize("shape", TREES)
def test_walk_is_the_enumerated_rule(shape):
    """Node by node as `choose` with the same coins, for random distributions of every row."""
    generator, children = torch.Generator().manual_seed(1), TREES[shape]
    sequences, rows = 200, len(children)
    p_BNV = torch.rand(sequences, rows, V, generator=generator).square()
    p_BNV, q_BNV = p_BNV / p_BNV.sum(-1, keepdim=True), torch.rand(
        sequences, rows, V, generator=generator
    ).softmax(-1)  # fmt: skip
    coins_BN = torch.rand(sequences, rows, generator=generator)
    tokens_BN = torch.zeros(sequences, rows, dtype=torch.int64)
    for nodes in children:
        ids = torch.stack([torch.randperm(V, generator=generator) for _ in range(sequences)])
        tokens_BN[:, nodes] = ids[:, : len(nodes)]
    widest = max(len(nodes) for nodes in children)
    padded = torch.tensor([nodes + [-1] * (widest - len(nodes)) for nodes in children])
    which = torch.arange(sequences)
    drawn, lefts = Drawn(padded, torch.zeros(rows), q_BNV, torch.arange(V)), []

    def first(left_BV: Tensor, _: Tensor) -> Tensor:
        lefts.append(left_BV)
        return left_BV.argmax(-1)

    found = walk(lambda row_B: p_BNV[which, row_B], tokens_BN, drawn, coins_BN, first, 3)
    for b in range(sequences):
        row, expected = 0, [-1] * rows
        while True:
            nodes = children[row]
            siblings = tokens_BN[b, nodes].tolist()
            monitored = Monitored(Uniforms.of(coins_BN[b, nodes].tolist(), 0.5))
            expected[row] = choose(p_BNV[b, row], q_BNV[b, row], siblings, monitored)
            if monitored.left is not None:
                torch.testing.assert_close(lefts[0][b], monitored.left)
                break
            row = nodes[siblings.index(expected[row])]
        assert found[b].tolist() == expected


class Monitored:
    """Keeps the distribution that is drawn from."""

    def __init__(self, chance: Uniforms) -> None:
        self.chance, self.left = chance, None

    def accepts(self, probability: float) -> bool:
        return self.chance.accepts(probability)

    def draws(self, p_V: Tensor) -> int:
        self.left = p_V
        return int(p_V.argmax())


def test_a_token_of_equal_distributions_is_always_accepted():
    """Even where rounding makes p a little less than q: nothing would be left to draw from."""
    q_BV = torch.tensor([[0.0, 1.0 + 2**-23]])
    drawn = Drawn(torch.tensor([[1], [-1]]), torch.zeros(2), q_BV.expand(1, 2, 2), torch.arange(2))
    almost_one = torch.full((1, 2), 1 - 2**-24)
    found = walk(
        lambda _: torch.tensor([[0.0, 1.0]]), torch.tensor([[0, 1]]), drawn, almost_one,
        lambda left_BV, _: left_BV.argmax(-1), 1,
    )  # fmt: skip
    assert found.tolist() == [[1, 1]]


def test_nan_is_accepted_nowhere():
    p_BV = torch.tensor([[0.25] * 4, [torch.nan] * 4])
    tokens_BN, coins_BN = torch.tensor([[0, 2], [0, 2]]), torch.zeros(2, 2)
    children_NS, q_BNV = torch.tensor([[1], [-1]]), torch.full((2, 2, 4), 0.25)
    drawn = Drawn(children_NS, torch.zeros(2), q_BNV, torch.arange(4))
    found = walk(lambda _: p_BV, tokens_BN, drawn, coins_BN, partial(pick, torch.arange(2)), 1)
    assert found[0, 0] == 2
    assert found[0, 1] >= 0
    assert found[1].tolist() == [-1, -1]


def test_draft_ids_are_mapped_and_others_have_no_q():
    q_BNU, children_NS = torch.tensor([[[0.25, 0.75]] * 2]), torch.tensor([[1], [-1]])
    drawn = Drawn(children_NS, torch.zeros(2), q_BNU, torch.tensor([3, 1]))
    assert drawn.target_probs(torch.tensor([0]), 5).tolist() == [[0, 0.75, 0, 0.25, 0]]


def test_siblings_are_drawn_without_replacement():
    """First and second against q(a) and q(a) q(b) / (1 - q(a))."""
    logits = table(7, 1.0)[0]
    seeds, positions = torch.arange(COUNT), torch.full((COUNT,), 5)
    found = drawn_siblings(logits.expand(COUNT, -1), torch.ones(COUNT), seeds, positions, 2)
    q = logits.softmax(0)
    pairs = q[:, None] * q / (1 - q[:, None]) * (1 - torch.eye(V)) * COUNT
    counts = (found.ids_RA[:, 0] * V + found.ids_RA[:, 1]).bincount(minlength=V * V)
    off = ~torch.eye(V, dtype=torch.bool).flatten()
    assert counts[~off].sum() == 0
    assert (((counts - pairs.flatten()) ** 2 / pairs.flatten())[off]).sum() < LIMIT
    torch.testing.assert_close(found.probs_RU[0], q)
    torch.testing.assert_close(found.logprobs_RA.exp(), q[found.ids_RA])


def test_a_greedy_request_drafts_the_likeliest():
    logits = table(7, 1.0)
    found = drawn_siblings(logits, torch.zeros(1 + V), torch.arange(1 + V), torch.arange(1 + V), 2)
    assert torch.equal(found.ids_RA, logits.topk(2).indices)
    assert (found.probs_RU > 0).all()


def test_coins_are_uniform_below_one_and_of_their_own():
    seeds, positions = torch.arange(1000), torch.arange(20).expand(1000, -1)
    ranks = torch.tensor([0, 1] * 10)
    found = coins(seeds, positions, ranks)
    assert found.min() >= 0
    assert found.max() < 1
    counts = (found.flatten() * 16).long().bincount(minlength=16)
    assert ((counts - 1250.0) ** 2 / 1250).sum() < LIMIT
    assert len(found.unique()) > 19_900
    other = coins(seeds, positions, ranks.flip(0))
    assert (found == other).float().mean() < 0.01


def test_derived_seeds_differ():
    seeds = torch.tensor([random.getrandbits(62) for _ in range(100)])
    found = torch.cat([seeds, derived_seeds(seeds, 1), derived_seeds(seeds, 2)])
    assert len(found.unique()) == 300
