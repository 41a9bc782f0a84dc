"""Both verification rules by exact enumeration on tiny vocabularies, with controls that must fail.

Every outcome of every coin and draw of the real code is taken, with its probability: what comes out
must be p to 1e-12 in float64. The controls break one thing each. Uniforms sit on and beside the
thresholds. The joint of two drawn tokens is tested by chi-square through the real loop's draw.
"""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from aerie.eagle3 import rejection
from aerie.eagle3.rejection import Uniforms, choose, residual, without
from aerie.kernels.accept import accept_ref
from aerie.kernels.draw import draw_ref
from aerie.kernels.row_filter import row_filter_ref

EXACT = 1e-12


class Branching:
    """Takes the outcomes of a script, then the first ones; remembers what else was possible."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.taken, self.open, self.weight = script, [], [], 1.0

    def _take(self, weights: list[float]) -> int:
        possible = [i for i, weight in enumerate(weights) if weight > 0]
        at = len(self.taken)
        outcome = self.script[at] if at < len(self.script) else possible[0]
        if at >= len(self.script):
            self.open += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(outcome)
        self.weight *= weights[outcome]
        return outcome

    def accepts(self, probability: float) -> bool:
        return self._take([probability, 1 - probability]) == 0

    def draws(self, p_V: Tensor) -> int:
        return self._take(p_V.tolist())


def enumerated(p_V: Tensor, q_V: Tensor, siblings) -> Tensor:
    """The distribution of what `choose` gives for these siblings."""
    out_V, scripts = torch.zeros_like(p_V), [[]]
    while scripts:
        chance = Branching(scripts.pop())
        token = rejection.choose(p_V, q_V, siblings, chance)
        out_V[token] += chance.weight
        scripts += chance.open
    return out_V


def output(p_V: Tensor, drawn_V: Tensor, count: int, told_V: Tensor | None = None) -> Tensor:
    """... over all ordered draws of `count` siblings from `drawn_V`; the rule is told `told_V`."""
    out_V = torch.zeros_like(p_V)
    for siblings in permutations(range(len(p_V)), count):
        weight, left_V = 1.0, drawn_V
        for token in siblings:
            weight, left_V = weight * float(left_V[token]), without(left_V, token)
        if weight > 0:
            q_V = drawn_V if told_V is None else told_V
            out_V += weight * enumerated(p_V, q_V, siblings)
    return out_V


def distributions(seed: int, vocabulary: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    p_V, q_V = (torch.randn(vocabulary, dtype=torch.float64).mul(1.5).softmax(0) for _ in "pq")
    if seed % 3 == 1:  # filters: ids that only one of the two can give
        p_V, q_V = without(p_V, 0), without(q_V, 1)
    return p_V, q_V


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_rejection_gives_p(count):
    for seed in range(6):
        p_V, q_V = distributions(seed)
        assert (output(p_V, q_V, count) - p_V).abs().max() < EXACT


def test_one_hot_q_is_the_rule_of_greedy_drafts():
    p_V, _ = distributions(2)
    for token in range(5):
        one_hot_V = torch.zeros_like(p_V)
        one_hot_V[token] = 1.0
        assert (enumerated(p_V, one_hot_V, [token]) - p_V).abs().max() < EXACT


def test_equal_distributions_always_accept_and_disjoint_ones_never():
    p_V, _ = distributions(0)
    for token in range(5):
        assert enumerated(p_V, p_V, [token])[token] == 1.0
    p_V, q_V = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
    assert torch.equal(enumerated(p_V, q_V, [2, 3]), p_V)


BROKEN = ["residual", "softmax q", "sibling twice", "temperature", "cut by its own score"]


@pytest.mark.parametrize("broken", BROKEN)
def test_controls_fail(broken, monkeypatch):
    """Far from p: the enumeration sees each of these."""
    p_V, q_V = distributions(0)
    if broken == "residual":
        monkeypatch.setattr(rejection, "residual", lambda p_V, q_V: p_V)
        out_V = output(p_V, q_V, 2)
    elif broken == "softmax q":  # a greedy draft's token, judged as if drawn from q
        out_V = enumerated(p_V, q_V, [int(q_V.argmax())])
    elif broken == "sibling twice":
        monkeypatch.setattr(rejection, "without", lambda q_V, token: q_V)
        out_V = sum(
            (float(q_V[x]) * enumerated(p_V, q_V, [x, x]) for x in range(5)), torch.zeros_like(p_V)
        )
    elif broken == "cut by its own score":  # what came out improbable is not verified
        out_V = sum(
            (float(q_V[x]) * enumerated(p_V, q_V, [x] if q_V[x] > 0.2 else []) for x in range(5)),
            torch.zeros_like(p_V),
        )
    else:
        cold_V = q_V**2 / (q_V**2).sum()
        out_V = output(p_V, cold_V, 1, told_V=q_V)
    assert (out_V - p_V).abs().max() > 1e-3


def test_uniforms_around_the_threshold():
    p_V = torch.tensor([0.25, 0.75], dtype=torch.float64)
    q_V = torch.tensor([0.5, 0.5], dtype=torch.float64)
    below = float(torch.tensor(0.5).double().nextafter(torch.tensor(0.0).double()))
    for uniform, token in ((0.0, 0), (2**-24, 0), (below, 0), (0.5, 1), (1 - 2**-24, 1)):
        assert choose(p_V, q_V, [0], Uniforms.of([uniform], 0.0)) == token
    never = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert choose(never, q_V, [0], Uniforms.of([0.0], 0.0)) == 1
    for uniform, token in ((0.0, 0), (0.2499, 0), (0.25, 1), (1 - 2**-53, 1)):
        assert choose(p_V, q_V, [], Uniforms.of([], uniform)) == token


def test_rejects_a_sibling_that_q_cannot_draw():
    p_V, q_V = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    with pytest.raises(ValueError, match="siblings: 1 has probability 0 in q, or was tried before"):
        choose(p_V, q_V, [1, 1], Uniforms.of([0.99, 0.5], 0.5))


def test_residual_of_equal_distributions_is_p():
    p_V, _ = distributions(0)
    assert torch.equal(residual(p_V, p_V), p_V)


@pytest.mark.parametrize("tree", ["none", "best", "two"])
def test_draw_and_match_joint_of_two_tokens(tree):
    """20,000 seeds of draw and walk: chi-square of (first, second) against p(a) p(b | a)."""
    vocabulary, count = 4, 20_000
    torch.manual_seed(3)
    logits = torch.randn(1 + vocabulary, vocabulary)  # behind the root, and behind each token
    children = {"none": [], "best": [int(logits[0].argmax())], "two": [2, 0]}[tree]
    rows = torch.tensor([0, *(1 + child for child in children)])
    seeds = torch.arange(count)
    ids = torch.stack([drawn(logits[row], seeds, 10 + (i > 0)) for i, row in enumerate(rows)], 1)
    second = torch.stack([drawn(logits[1 + a], seeds, 11) for a in range(vocabulary)], 1)
    tokens = torch.tensor([0, *children]).expand(count, -1).reshape(-1)
    parents = torch.tensor([-1, *[0] * len(children)]).expand(count, -1).reshape(-1)
    starts = torch.arange(count + 1) * len(rows)
    walked = accept_ref(tokens, parents, ids.reshape(-1), starts, 2)
    first = walked.ids_BP[:, 0]
    follow = torch.where(walked.num_accepted_B > 0, walked.ids_BP[:, 1], 0)
    plain = second.gather(1, first[:, None])[:, 0]
    pairs = first * vocabulary + torch.where(walked.num_accepted_B > 0, follow, plain)
    p = logits[0].softmax(0)[:, None] * logits[1:].softmax(-1)
    expected, seen = p.flatten() * count, pairs.bincount(minlength=vocabulary**2)
    assert ((seen - expected) ** 2 / expected).sum() < 57  # 15 degrees of freedom, alpha 1e-6


def drawn(logits_V: Tensor, seeds: Tensor, position: int) -> Tensor:
    logits = logits_V.expand(len(seeds), -1)
    kept = row_filter_ref(logits, torch.ones(len(seeds)))
    return draw_ref(logits, kept, seeds, torch.full_like(seeds, position))
