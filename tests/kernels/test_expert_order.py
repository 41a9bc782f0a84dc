"""Pairs sorted by expert: every index exactly that of a stable sort.

Regimes: histograms that are empty, single, all to one, uniform and adversarial (all but one to
one); counts on both sides of a tile and of a block of ids; several choices; experts elsewhere, some
or all; every slot used; no rows; ids of a wrong expert; bad arguments.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerie.kernels.expert_order import (
    MAX_PAIRS,
    _expert_order_op,
    _launch_config,
    expert_order,
    expert_order_ref,
    slots_for,
)
from tests.evidence import check_compiles, edges, few_examples, on_gpu, run_guarded, same_bits

HISTOGRAMS = ("all to one", "uniform", "adversarial", "random", "last")


def make_ids(kind: str, rows: int, choices: int, experts: int, device) -> torch.Tensor:
    pairs = torch.arange(rows * choices)
    ids = {
        "all to one": torch.full_like(pairs, experts // 2),
        "uniform": pairs % experts,
        "adversarial": torch.where(pairs == 1, 0, experts - 1),
        "random": torch.randint(experts, pairs.shape, generator=torch.Generator().manual_seed(1)),
        "last": torch.full_like(pairs, experts - 1),
    }[kind]
    return ids.int().view(rows, choices).to(device)


def check(ids, *options) -> None:
    actual, expected = run_guarded(expert_order, ids, *options), expert_order_ref(ids, *options)
    assert same_bits(actual.pairs_P, expected.pairs_P)
    assert same_bits(actual.tiles_3N, expected.tiles_3N)


@pytest.mark.parametrize("kind", HISTOGRAMS)
def test_is_the_stable_sort(kind, device):
    for rows, choices, experts, tile in ((1, 1, 4, 64), (37, 1, 4, 8)):
        check(make_ids(kind, rows, choices, experts, device), experts, 0, tile)


def test_many_experts(device):
    ids = make_ids("random", 9, 3, 128, device)
    order, expected = expert_order(ids, 128, 0, 16), expert_order_ref(ids, 128, 0, 16)
    assert same_bits(order.tiles_3N, expected.tiles_3N)
    assert same_bits(order.pairs_P, expected.pairs_P)


@few_examples
@given(edges(32, 70), edges(2, 3), edges(4, 6), st.sampled_from([1, 7, 16]))
def test_any_shape(device, rows, choices, experts, tile):
    check(make_ids("random", rows, choices, experts, device), experts, 0, tile)


@pytest.mark.parametrize("case", [(2100, 5, 64), *on_gpu((8192, 128, 64), (65536, 16, 128))])
def test_more_ids_than_a_block(case, device):
    rows, experts, tile = case
    for kind in ("random", "all to one"):
        check(make_ids(kind, rows, 1, experts, device), experts, 0, tile)


def test_experts_elsewhere_come_last(device):
    ids = torch.tensor([[5, 0], [2, 9], [3, -1]], dtype=torch.int32, device=device)
    order = expert_order(ids, 2, 2, 2)  # experts 2 and 3 are here
    assert order.pairs_P.tolist() == [2, 4, 0, 1, 3, 5]
    assert order.tiles_3N.t().tolist()[:4] == [[0, 0, 1], [1, 1, 1], [-1, 2, 2], [-1, 4, 2]]
    for first in (0, 3, 1000):
        check(ids, 2, first, 2)


def test_slots_hold_the_worst_case():
    for pairs in range(1, 40):
        for experts in (1, 3, 16):
            for tile in (1, 4, 64):
                groups = min(pairs, experts + 1)
                counts = [1] * (groups - 1) + [pairs - groups + 1]  # the most tiles
                most = sum(-(-count // tile) for count in counts)
                assert slots_for(pairs, experts, tile) == most


def test_no_rows(device):
    order = expert_order(torch.empty(0, 2, dtype=torch.int32, device=device), 4)
    assert order.pairs_P.shape == (0,)
    assert order.tiles_3N.shape == (3, 0)


def test_compiles_once_for_all_row_counts(device):
    ids = make_ids("random", 40, 1, 4, device)
    check_compiles(expert_order, ids[:20], 4, again=(ids, 4))


def test_opcheck(device):
    torch.library.opcheck(_expert_order_op, (make_ids("random", 9, 2, 4, device), 4, 1, 3))


def test_rejects_bad_arguments(device):
    ids = make_ids("random", 4, 2, 4, device)
    for bad in (ids[0], ids.long(), ids.t()):
        with pytest.raises(ValueError, match=r"ids_TA: must be a contiguous int32 \[T, A\]"):
            expert_order(bad, 4)
    with pytest.raises(ValueError, match="ids_TA: must hold at most"):
        expert_order(torch.empty(MAX_PAIRS + 1, 1, dtype=torch.int32, device="meta"), 4)
    with pytest.raises(ValueError, match="experts: must be 1 to 1024, got 0"):
        expert_order(ids, 0)
    with pytest.raises(ValueError, match="first_expert: must be at least 0"):
        expert_order(ids, 4, -1)
    with pytest.raises(ValueError, match="tile_pairs: must be at least 1"):
        expert_order(ids, 4, 0, 0)


def test_launch_config():
    for pairs in (1, 64, 1024, 8192):
        for experts in (1, 16, 128, 1024):
            config = _launch_config(pairs, experts)
            bins = experts + 2  # the groups, the others, and the padding
            assert bins <= config.BLOCK_E
            assert config.BLOCK_P & (config.BLOCK_P - 1) == 0
