"""Steps that are drawn up together are those that would be drawn up one by one.

Regimes: one sequence and several of different lengths; one pool and, with chunked layers, two;
fewer sequences than the cache has rows; no steps at all.
"""

import pytest
import torch

from aerie.llama4.cache import PagedKVCache
from aerie.llama4.device_steps import chain_shape, device_step, successive_steps

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
