"""How much memory the keys and values of a model take, by the rule that allocates them.

Regimes: Scout at 128k and at lengths around the ring's; models without chunks and of chunks alone;
pages of 1 to 64 tokens; the ring's bound itself, slot by slot.
"""

import pytest

from aerie.llama4.cache import MAX_STEP_ROWS, PagedKVCache
from aerie.llama4.config import Llama4Config
from aerie.llama4.kv_plan import plan_pools

SCOUT = Llama4Config.from_hf(
    {
        "model_type": "llama4_text",
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "max_position_embeddings": 10485760,
        "attention_chunk_size": 8192,
    }
)
CHUNKS = [SCOUT.attention(layer).chunk_size for layer in range(SCOUT.num_hidden_layers)]
TOKEN = 2 * 8 * 128 * 2  # bytes of keys and values of a token in a layer, bfloat16


def allocated(chunk_sizes, max_length: int, page_size=64, max_step_rows=MAX_STEP_ROWS) -> int:
    plans = plan_pools(chunk_sizes, max_length, page_size, max_step_rows)
    return sum(plan.bytes(page_size, 8, 128, 2) for plan in plans)


def test_scout_at_128k_takes_three_tenths_of_the_full_cache():
    length = 128 * 1024
    full = allocated([None] * 48, length)
    assert full == 48 * length * TOKEN == 24 * 2**30
    with_rings = allocated(CHUNKS, length)
    assert with_rings == (12 * length + 36 * 9216) * TOKEN  # 7.3 GiB
    assert 0.300 < with_rings / full < 0.305  # a quarter is the 12 layers without chunks


def test_longer_contexts_approach_a_quarter():
    shares = [allocated(CHUNKS, n * 2**20) / allocated([None] * 48, n * 2**20) for n in (1, 10)]
    assert 0.25 < shares[1] < shares[0] < 0.257


def test_the_draft_and_short_contexts_have_one_pool():
    for chunk_sizes, length in (([None], 131072), (CHUNKS, 4096), (CHUNKS, 9216)):
        (plan,) = plan_pools(chunk_sizes, length, 64, MAX_STEP_ROWS)
        assert plan.layers == tuple(range(len(chunk_sizes)))
        assert plan.num_pages == plan.num_logical_pages
        assert plan.chunk_size is None
    assert len(plan_pools(CHUNKS, 9217, 64, MAX_STEP_ROWS)) == 2


def test_the_full_pool_comes_first():
    full, ring = plan_pools([8, None, 8, 8], 100, 4, 6)
    assert (full.layers, ring.layers) == ((1,), (0, 2, 3))
    assert (full.num_pages, ring.num_pages, ring.num_logical_pages) == (25, 4, 25)
    (alone,) = plan_pools([8, 8], 100, 4, 6)
    assert alone.chunk_size == 8


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
@pytest.mark.parametrize(("chunk_size", "rows"), [(8, 1), (8, 5), (13, 16), (64, 64)])
def test_no_row_of_a_step_writes_over_a_slot_that_it_sees(page_size, chunk_size, rows):
    (plan,) = plan_pools([chunk_size], 10_000, page_size, rows)
    ring = plan.num_pages * page_size
    for length in range(3 * chunk_size + 1):
        live = range(length - length % chunk_size, length + rows)
        assert len({slot % ring for slot in live}) == len(live)
    assert ring - page_size < chunk_size - 1 + rows, "a page too many"


def test_the_constructor_allots_what_the_plan_says():
    chunk_sizes = [None, 16, 16, 16]
    cache = PagedKVCache(
        4, 2, 8, 500, chunk_sizes=chunk_sizes, max_step_rows=9, page_size=4, num_sequences=3
    )
    plans = plan_pools(chunk_sizes, 500, 4, 9)
    held = [pool.k_LRCGK.nbytes + pool.v_LRCGK.nbytes for pool in cache.pools]
    assert held == [3 * plan.bytes(4, 2, 8, 4) for plan in plans]
    assert [layer.pool for layer in cache.layers] == [0, 1, 1, 1]
    for pool, plan in zip(cache.pools, plans, strict=True):
        assert pool.page_table_BM.shape == (3, plan.num_logical_pages)
        used = [set(row) for row in pool.page_table_BM.tolist()]
        assert [len(pages) for pages in used] == [plan.num_pages] * 3
        assert set.union(*used) == set(range(3 * plan.num_pages))
