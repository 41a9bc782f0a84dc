"""Distinct experts of a pass: against the routing of every layer, and nothing left behind."""

import pytest
import torch

from aerie.kernels.router import Routing
from aerie.llama4.expert_counts import ExpertCounts, counted_experts
from aerie.llama4.moe import MoE
from tests.test_lossless import random_target


def moe_layers(target) -> list[MoE]:
    return [module for module in target.modules() if isinstance(module, MoE)]


def test_counts_are_those_of_the_routing(monkeypatch):
    target = random_target(3, num_hidden_layers=4)
    cache, ids = target.allocate_cache(40), torch.arange(20) % 32
    target(ids[:4], cache.causal_step(4))  # not counted
    sets: list[tuple[int, int]] = []
    for layer in moe_layers(target):
        honest = layer._prologue

        def prologue(*arguments, honest=honest):
            entry = honest(*arguments)
            ids = entry.routing.ids_TA
            sets.append((len(ids), len({*ids.flatten().tolist()})))
            return entry

        monkeypatch.setattr(layer, "_prologue", prologue)
    with counted_experts(target) as counts:
        for rows in (1, 5, 5, 20):
            target(ids[:rows], cache.causal_step(rows))
    found = counts.read()
    for rows in (1, 5, 20):
        expected = [count for n, count in sets if n == rows]
        assert found[rows] == sum(expected) / len(expected)
    assert list(found) == [1, 5, 20]
    assert found[1] <= target.config.num_experts_per_tok


def test_closed_it_is_gone_even_after_an_error():
    target = random_target(3, num_hidden_layers=4)
    with pytest.raises(RuntimeError), counted_experts(target) as counts:
        raise RuntimeError
    assert all(layer.on_routing is None for layer in moe_layers(target))
    target(torch.arange(4), target.allocate_cache(8).causal_step(4))
    assert counts.read() == {}


def test_counting_reads_nothing():
    """A tensor without values cannot be waited for."""
    counts = ExpertCounts(1, 8, [], [])
    ids = torch.empty(5, 1, dtype=torch.int32, device="meta")
    counts.add(Routing(ids, torch.empty(5, 1, device="meta")))
    assert counts._rows == [5]


def test_rejects_a_target_without_experts(monkeypatch):
    target = random_target(3, num_hidden_layers=4)
    monkeypatch.setattr(target, "modules", lambda: iter([]))
    with pytest.raises(ValueError, match="count_experts: this target has no layer with experts"):
        counted_experts(target).__enter__()
