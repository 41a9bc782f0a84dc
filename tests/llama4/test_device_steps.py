"""Steps that are drawn up together are those that would be drawn up one by one.

Regimes: one sequence and several of different lengths; one pool and, with chunked layers, two;
fewer sequences than the cache has rows; no steps at all. What a captured round reads outlives
prompts of any number of lengths, and trees of any number of shapes.
"""

from itertools import islice, product

import pytest
import torch

from aerie.llama4.cache import PagedKVCache, Tree
from aerie.llama4.device_steps import (
    chain_shape,
    counting,
    device_shape,
    device_step,
    successive_steps,
)

CHUNKS = {"full": [None, None], "chunked": [8, None]}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("lengths", [[5], [0, 7, 13]])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_successive_steps_are_steps(chunks, lengths, count):
    cache = PagedKVCache(
        2, 1, 4, 40, chunk_sizes=CHUNKS[chunks], max_step_rows=4, num_sequences=4, page_size=4
    )
    lengths_B = torch.tensor(lengths)
    further = successive_steps(cache, lengths_B, count)
    assert further.positions_NB.tolist() == [[n + i for n in lengths] for i in range(count)]
    assert len(further.steps) == count
    for number, step in enumerate(further.steps):
        alone = device_step(cache, lengths_B + number, chain_shape(1, lengths_B.device))
        assert len(step.placements) == len(alone.placements) == len(cache.pools)
        for own, expected in zip(step.placements, alone.placements, strict=True):
            assert torch.equal(own.slots_T, expected.slots_T)
            for name in ("positions_T", "row_starts_B1", "prefix_lengths_B", "page_table_BM"):
                ours, theirs = getattr(own.rows, name), getattr(expected.rows, name)
                assert ours.dtype == theirs.dtype, name
                assert torch.equal(ours, theirs), name
            assert own.rows.ancestors_T is None
            assert own.rows.max_rows == 1


def test_what_a_captured_round_reads_stays():
    """A graph holds no tensors: what is dropped becomes someone else's memory under it."""
    cache, lengths_B = PagedKVCache(1, 1, 4, 700), torch.tensor([5])

    def read_by_a_step(rows: int) -> list[torch.Tensor]:
        shape = chain_shape(rows, lengths_B.device)
        starts_B1 = device_step(cache, lengths_B, shape).rows.row_starts_B1
        return [counting(rows, lengths_B.device), shape.parents_N, shape.depths_N, starts_B1]

    of_round, tree = read_by_a_step(4), Tree((-1, 0, 0))
    drawn_up = device_shape(tree, lengths_B.device)
    for rows in range(1, 600):
        read_by_a_step(rows)
    for parents in islice(product((0, 1), repeat=9), 300):
        device_shape(Tree((-1, 0, *parents)), lengths_B.device)
    assert all(x is y for x, y in zip(read_by_a_step(4), of_round, strict=True))
    assert device_shape(tree, lengths_B.device) is drawn_up
