"""The paged cache against plain lists: every value carries its own token, so a wrong row shows.

Regimes: page tables in order and shuffled, several pages, one slot per page; chains, trees whose
accepted path is scattered, two sequences, rejected steps, rollback and regrowth; the limits.
"""

import pytest
import torch

from aerie.kernels.kv_append import kv_append_ref
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.step import Tree

LAYERS, HEADS, DIM = 2, 3, 4
TREE = Tree((-1, 0, 0, 1, 1, 2, 3, 6))
DEPTHS = [0, 1, 1, 2, 2, 2, 3, 4]


class ListCache:
    """What the cache must hold: per sequence the list of its committed tokens."""

    def __init__(self, cache: PagedKVCache) -> None:
        self.cache = cache
        self.tokens: list[list[int]] = [[] for _ in cache.lengths]
        self.last: list[list[int]] = []
        self.fresh = 0

    def run(self, step, *counts: int) -> None:
        """Appends new, distinct tokens in all layers, as a forward pass does."""
        tokens = torch.arange(self.fresh, self.fresh + sum(counts))
        self.fresh += sum(counts)
        self.last = [part.tolist() for part in tokens.split(list(counts))]
        for layer in range(LAYERS):
            keys, kv = expected_rows(tokens, layer), self.cache.layers[layer]
            slots = step.placements[kv.pool].slots_T
            kv_append_ref(keys, -keys, kv.k_RCGK, kv.v_RCGK, slots)

    def commit(self, sequence: int, *path: int) -> None:
        self.cache.commit(sequence, path)
        self.tokens[sequence] += [self.last[sequence][row] for row in path]
        self.check()

    def rollback(self, sequence: int, length: int) -> None:
        self.cache.rollback(sequence, length)
        del self.tokens[sequence][length:]
        self.check()

    def check(self) -> None:
        assert self.cache.lengths == [len(tokens) for tokens in self.tokens]
        for sequence, tokens in enumerate(self.tokens):
            for layer in range(LAYERS):
                expected = expected_rows(torch.tensor(tokens, dtype=torch.int64), layer)
                keys, values = read(self.cache, layer, sequence)
                assert torch.equal(keys, expected)
                assert torch.equal(values, -expected)


def expected_rows(tokens, layer: int):
    """[T, HEADS, DIM], different for every token, layer, head and dimension."""
    inner = torch.arange(HEADS * DIM).view(HEADS, DIM)
    return (tokens[:, None, None] * 1000 + layer * 100 + inner + 1).float()


def read(cache: PagedKVCache, layer: int, sequence: int):
    """Committed keys and values in position order, straight through the page table."""
    (pool,) = cache.pools
    size = pool.page_size
    table = pool.page_table_BM[sequence].tolist()
    where = [(table[slot // size], slot % size) for slot in range(cache.lengths[sequence])]
    rows = [(pool.k_LRCGK[layer][at], pool.v_LRCGK[layer][at]) for at in where]
    empty = torch.empty(0, HEADS, DIM)
    return tuple(torch.stack(part) for part in zip(*rows, strict=True)) or (empty, empty)


@pytest.fixture(params=["in order", "shuffled"])
def make_cache(request):
    """`make_cache(max_length, page_size, num_sequences=1)` with pages in order or shuffled."""

    def make(max_length: int, page_size: int, num_sequences: int = 1) -> ListCache:
        cache = PagedKVCache(
            LAYERS, HEADS, DIM, max_length, num_sequences=num_sequences, page_size=page_size
        )
        (pool,) = cache.pools
        if request.param == "shuffled":
            table = pool.page_table_BM
            pool.use_pages(torch.randperm(table.numel()).view(table.shape).tolist())
        pool.k_LRCGK.fill_(torch.nan)
        pool.v_LRCGK.fill_(torch.nan)
        return ListCache(cache)

    return make


@pytest.mark.parametrize("page_size", [1, 4, 64])
def test_chain_tree_and_rollback(page_size, make_cache):
    lists = make_cache(40, page_size)
    lists.run(lists.cache.causal_step(7), 7)
    lists.commit(0, *range(7))
    lists.run(lists.cache.tree_step(TREE), 8)
    lists.commit(0, 0, 1, 3, 6, 7)  # a scattered path to the deepest leaf
    lists.run(lists.cache.tree_step(TREE), 8)
    lists.commit(0, 0, 2, 5)
    lists.run(lists.cache.tree_step(TREE), 8)
    lists.commit(0, 0)
    lists.run(lists.cache.causal_step(4), 4)
    lists.commit(0, 0, 1)  # a chain, half accepted
    lists.rollback(0, 9)
    lists.run(lists.cache.causal_step(5), 5)
    lists.commit(0, *range(5))
    lists.rollback(0, 0)
    lists.run(lists.cache.causal_step(40), 40)
    lists.commit(0, *range(40))


def test_a_step_that_is_not_committed_leaves_no_trace(make_cache):
    lists = make_cache(16, 4)
    lists.run(lists.cache.causal_step(5), 5)
    lists.commit(0, *range(5))
    lists.run(lists.cache.tree_step(TREE), 8)
    lists.check()
    lists.run(lists.cache.causal_step(2), 2)
    lists.commit(0, 0, 1)


def test_sequences_keep_to_their_own_pages(make_cache):
    lists = make_cache(20, 4, num_sequences=2)
    lists.run(lists.cache.causal_step(3, 9), 3, 9)
    lists.commit(0, *range(3))
    lists.commit(1, *range(9))
    lists.run(lists.cache.tree_step(TREE, Tree((-1, 0, 0))), 8, 3)
    lists.commit(1, 0, 2)
    lists.commit(0, 0, 1, 4)
    lists.rollback(1, 4)
    lists.run(lists.cache.causal_step(1, 2), 1, 2)
    lists.commit(0, 0)
    lists.commit(1, 0, 1)


@pytest.mark.parametrize("seed", range(5))
def test_random_rounds(seed, make_cache):
    torch.manual_seed(seed)
    lists = make_cache(64, 8)
    for _ in range(30):
        rows = int(torch.randint(1, 9, ()))
        parents = (-1, *(int(torch.randint(0, row, ())) for row in range(1, rows)))
        if lists.cache.lengths[0] + rows > 64:
            lists.rollback(0, int(torch.randint(0, 64 - rows, ())))
        lists.run(lists.cache.tree_step(Tree(parents)), rows)
        path = [int(torch.randint(0, rows, ()))]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        lists.commit(0, *path)


def test_tree_rows_stand_at_their_depth(make_cache):
    lists = make_cache(40, 8)
    lists.run(lists.cache.causal_step(6), 6)
    lists.commit(0, *range(6))
    rows = lists.cache.tree_step(TREE).rows
    assert rows.positions_T.tolist() == [6 + depth for depth in DEPTHS]
    assert rows.prefix_lengths_B.tolist() == [6]
    assert rows.ancestors_T is not None
    seen = [[bit for bit in range(8) if word >> bit & 1] for word in rows.ancestors_T.tolist()]
    assert seen[7] == [0, 1, 3, 6, 7]
    assert seen[5] == [0, 2, 5]


def test_ancestors_fit_64_rows():
    words = Tree((-1, *range(63))).ancestor_words()
    assert words[63] == -1  # all 64 bits of a signed word
    assert words[62] == 2**63 - 1


def test_rejects_rows_beyond_capacity(make_cache):
    lists = make_cache(10, 4)  # three pages of four: the limit is 10, not 12
    lists.run(lists.cache.causal_step(8), 8)
    lists.commit(0, *range(8))
    with pytest.raises(ValueError, match=r"sequence 0: 8 cached and 3 new rows .* max_length 10"):
        lists.cache.causal_step(3)
    with pytest.raises(ValueError, match=r"8 cached and 8 new rows"):
        lists.cache.tree_step(TREE)
    lists.run(lists.cache.causal_step(2), 2)
    lists.commit(0, 0, 1)


def test_rejects_wrong_calls(make_cache):
    cache = make_cache(200, 8).cache
    with pytest.raises(ValueError, match=r"at most 64 rows per sequence, got 65"):
        cache.tree_step(Tree((-1, *range(64))))
    with pytest.raises(ValueError, match=r"one per sequence \(1\), got 2"):
        cache.causal_step(1, 1)
    for length in (1, -1):
        with pytest.raises(ValueError, match=rf"length: must be 0\.\.0, got {length}"):
            cache.rollback(0, length)


@pytest.mark.parametrize("parents", [(0,), (-1, 1), (-1, 2, 0), (-1, -2)])
def test_rejects_parents_behind_their_children(parents):
    with pytest.raises(ValueError, match="parents: entry i must be an earlier row"):
        Tree(parents)


def test_rejects_a_path_beyond_the_last_step(make_cache):
    cache = make_cache(8, 4).cache
    cache.causal_step(3)
    with pytest.raises(ValueError, match=r"path: must be ascending rows 0\.\.2 of the last"):
        cache.commit(0, [0, 1, 3])
