"""Choices from logits that lie in columns on several ranks, against those from whole rows.

Regimes: random rows, vocabularies that the ranks do not divide, and coarse logits, so
that ties lie at boundaries and across cuts; every filter alone and all together, rows without one
beside others; greedy rows among drawn ones; masked columns, a rank whose columns are all masked;
NaN, +inf and nothing but -inf on one rank; bytes that do not grow with the vocabulary.
"""

import random

import pytest
import torch

from aerie.eagle3.sharded_choice import ShardedChoice
from aerie.kernels.argmax import argmax_ref
from aerie.kernels.draw import draw_ref
from aerie.kernels.row_filter import row_filter_ref
from aerie.llama4.communicator import Communicator

FILTERS = ["none", "top_k", "top_p", "min_p", "all"]


def logits_of(choose: random.Random, rows: int, vocabulary: int) -> torch.Tensor:
    torch.manual_seed(choose.getrandbits(32))
    logits = torch.randn(rows, vocabulary) * choose.choice([0.3, 2, 6])
    if choose.random() < 0.5:
        logits = logits.mul(2).round()
    if choose.random() < 0.3:
        logits[:, : vocabulary // 2] = -torch.inf
    if choose.random() < 0.2:
        logits[choose.randrange(rows), choose.randrange(vocabulary)] = choose.choice(
            [torch.nan, torch.inf, -torch.inf]
        )
    if choose.random() < 0.1:
        logits[choose.randrange(rows)] = -torch.inf
    return logits


def columns_of(choose: random.Random, rows: int, filters: str) -> list[torch.Tensor | None]:
    """Temperature, top-k, top-p, min-p of every row."""
    asked = [filters in (name, "all") for name in FILTERS[1:4]]
    temperature = torch.tensor([choose.choice([0.0, 0.3, 1.0, 2.5]) for _ in range(rows)])
    top_k = torch.tensor([choose.choice([0, 1, 3, 20, 10**6]) for _ in range(rows)])
    top_p = torch.tensor([choose.choice([1.0, 0.9, 0.5, 1e-6]) for _ in range(rows)])
    min_p = torch.tensor([choose.choice([0.0, 0.05, 0.5, 1.0]) for _ in range(rows)])
    columns = zip(asked, (top_k, top_p, min_p), strict=True)
    return [temperature, *(column if is_on else None for is_on, column in columns)]


def compare(group, filters: str, count: int) -> list[str]:
    """What differs; every rank has the same random rows and looks at its columns only."""
    communicator, choose, wrong = Communicator(group), random.Random(f"{filters}"), []
    for case in range(count):
        rows, vocabulary = choose.randint(1, 5), choose.choice([7, 32, 1000, 5001])
        logits, columns = logits_of(choose, rows, vocabulary), columns_of(choose, rows, filters)
        seeds, positions = torch.randint(2**62, (rows,)), torch.arange(rows) + case
        whole = draw_ref(logits, row_filter_ref(logits, *columns), seeds, positions)
        sharded = ShardedChoice(communicator, vocabulary, "eager")
        own = logits[:, communicator.shard.part(vocabulary)]
        drawn, greedy = sharded.drawn(own, seeds, positions, *columns), sharded.greedy(own)
        if not torch.equal(drawn, whole) or not torch.equal(greedy, argmax_ref(logits)):
            wrong.append(f"{case}: V {vocabulary}, {columns}: {drawn} for {whole}, {greedy}")
    return wrong


@pytest.mark.parametrize("filters", FILTERS)
def test_whole_rows_and_columns_choose_alike(ranks, filters):
    assert ranks(compare, filters, 30) == [[]] * ranks.size
