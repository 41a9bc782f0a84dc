"""Chunked layers whose pages are used again, against a cache that keeps everything.

Regimes: prompts over several chunks in steps of all sizes; trees and chains that straddle a chunk
edge, of which nothing, a part or a scattered path is accepted; steps that are never committed; two
sequences of unlike lengths; pages of 1, 16 and 64 tokens; NaN in every slot that the committed
lengths say is dead, before every step; rollback, refused exactly where data was lost; steps that
are too long. Both backends; the Triton kernels interpreted, in fewer steps.
"""

import random

import pytest
import torch

from aerie.kernels.kv_append import kv_append_ref
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.config import Llama4Config
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.step import Tree
from tests.evidence import same_bits

VOCAB, CHUNK, ROWS, LENGTH = 32, 16, 12, 200


def make_target(backend="eager", num_layers=4) -> Llama4ForCausalLM:
    torch.manual_seed(1)
    config = {
        "model_type": "llama4_text",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 2,
        "moe_layers": [],
        "no_rope_layer_interval": 4 if num_layers > 2 else 2,
        "attention_chunk_size": CHUNK,
        "max_position_embeddings": 256,
    }
    model = Llama4ForCausalLM(Llama4Config.from_hf(config), backend)
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def poison_dead_slots(cache: PagedKVCache) -> None:
    """NaN in every slot that holds no committed position of the current chunk (or sequence)."""
    for pool in cache.pools:
        shape = pool.k_LRCGK.shape
        live = torch.zeros(shape[1] * shape[2], dtype=torch.bool)
        for sequence, length in enumerate(cache.lengths):
            chunk = pool.plan.chunk_size
            first = 0 if chunk is None else length - length % chunk
            live[pool.slots(sequence, range(first, length))] = True
        for part in (pool.k_LRCGK, pool.v_LRCGK):
            part.flatten(1, 2)[:, ~live] = torch.nan


class Twins:
    """The same steps on a cache with rings and on one without; both must give the same bits."""

    def __init__(self, target: Llama4ForCausalLM, page_size: int, num_sequences: int) -> None:
        self.target = target
        self.ring, self.full = (
            target.allocate_cache(LENGTH, num_sequences, page_size, rows) for rows in (ROWS, 1000)
        )
        assert [len(cache.pools) for cache in (self.ring, self.full)] == [2, 1]

    def step(self, parts: list[int] | list[Tree]) -> None:
        counts = [part if isinstance(part, int) else len(part.parents) for part in parts]
        ids = torch.randint(VOCAB, (sum(counts),))
        logits = []
        for cache in (self.ring, self.full):
            poison_dead_slots(cache)
            is_chain = isinstance(parts[0], int)
            step = cache.causal_step(*parts) if is_chain else cache.tree_step(*parts)
            logits.append(self.target(ids, step).logits_TV)
        assert logits[0].isfinite().all()
        assert same_bits(logits[0], logits[1]), f"at {self.ring.lengths}, {parts}"

    def commit(self, sequence: int, path: list[int]) -> None:
        for cache in (self.ring, self.full):
            cache.commit(sequence, path)


def random_tree(choose: random.Random) -> Tree:
    rows = choose.randint(1, ROWS)
    return Tree((-1, *(choose.randrange(max(0, row - 3), row) for row in range(1, rows))))


def random_path(choose: random.Random, parents: tuple[int, ...]) -> list[int]:
    path = [choose.randrange(len(parents))]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("num_sequences", [1, 2])
@torch.inference_mode()
def test_the_same_bits_as_a_cache_that_keeps_everything(page_size, num_sequences):
    choose = random.Random(page_size)
    twins = Twins(make_target(), page_size, num_sequences)
    sequences, edges = range(num_sequences), 0
    while max(twins.ring.lengths) < LENGTH - ROWS:
        lengths = list(twins.ring.lengths)
        if choose.random() < 0.3:
            counts = [choose.randint(1, ROWS) for _ in sequences]
            twins.step(counts)
            paths = [list(range(choose.randint(1, count))) for count in counts]
        else:
            trees = [random_tree(choose) for _ in sequences]
            twins.step(trees)
            paths = [random_path(choose, tree.parents) for tree in trees]
        if choose.random() < 0.2:
            continue  # the step failed: nothing of it counts
        for sequence in sequences:
            twins.commit(sequence, paths[sequence])
            edges += lengths[sequence] // CHUNK != twins.ring.lengths[sequence] // CHUNK
    assert edges >= LENGTH // CHUNK - 3


@pytest.mark.parametrize("before", range(CHUNK - 5, CHUNK + 2))
@torch.inference_mode()
def test_rejected_rows_at_an_edge(before):
    """A tree over the end of the fourth chunk keeps only its root, thrice; then a chain stays."""
    twins = Twins(make_target(), 4, 1)
    for count in (12, 12, 12, 12, before // 2, before - before // 2):
        twins.step([count])
        twins.commit(0, list(range(count)))
    for _ in range(3):
        twins.step([Tree((-1, 0, 1, 2, 3, 0, 5, 6, 7, 8, 1, 10))])
        twins.commit(0, [0])
    twins.step([Tree(tuple(range(-1, ROWS - 1)))])
    twins.commit(0, list(range(ROWS)))
    twins.step([1])


@torch.inference_mode()
def test_triton_backend():
    choose = random.Random(0)
    twins = Twins(make_target("triton", num_layers=2), 16, 1)
    for _ in range(4):
        twins.step([ROWS])
        twins.commit(0, list(range(ROWS)))
    for _ in range(3):
        tree = random_tree(choose)
        twins.step([tree])
        twins.commit(0, random_path(choose, tree.parents))


class Slots:
    """A cache with a full and a chunked layer, whose rows hold their own number."""

    def __init__(self, page_size: int) -> None:
        self.cache = PagedKVCache(
            2, 1, 2, 300, chunk_sizes=[None, CHUNK], max_step_rows=ROWS, page_size=page_size
        )
        self.tokens: list[int] = []
        self.fresh = 1

    def run(self, count: int, kept: int) -> None:
        step = self.cache.causal_step(count)
        tokens = list(range(self.fresh, self.fresh + count))
        self.fresh += count
        rows = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(count, 1, 2)
        for kv in self.cache.layers:
            slots = step.placements[kv.pool].slots_T
            kv_append_ref(rows, -rows, kv.k_RCGK, kv.v_RCGK, slots)
        self.cache.commit(0, range(kept))
        self.tokens += tokens[:kept]

    def is_intact(self, length: int) -> bool:
        """Whether the chunked layer still holds what a row at `length` would see."""
        where = range(length - length % CHUNK, length)
        slots = self.cache.pools[1].slots(0, where)
        held = self.cache.layers[1].k_RCGK.flatten(0, 1)[slots, 0, 0]
        return held.tolist() == [self.tokens[slot] for slot in where]


@pytest.mark.parametrize("page_size", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_rollback_is_refused_exactly_where_data_was_lost(page_size, seed):
    choose, slots = random.Random(seed), Slots(page_size)
    refused = 0
    for _ in range(150):
        length = slots.cache.lengths[0]
        assert length == len(slots.tokens)
        if choose.random() < 0.15:
            back = choose.choice([length // 2, max(0, length - 9), length - length % CHUNK, length])
            if slots.is_intact(back):
                slots.cache.rollback(0, back)
                del slots.tokens[back:]
            else:
                refused += 1
                with pytest.raises(ValueError, match=f"length: {back} needs slots from"):
                    slots.cache.rollback(0, back)
                assert slots.cache.lengths == [length]
        count = choose.randint(1, ROWS)
        if length + count <= slots.cache.max_length:
            slots.run(count, choose.randint(0, count))
        assert slots.is_intact(slots.cache.lengths[0])
    assert refused > 3


def test_a_sequence_begun_again_can_roll_back_again():
    slots = Slots(page_size=1)
    for _ in range(10):
        slots.run(ROWS, ROWS)
    for start in (64, 0):  # chunk edges: nothing older is needed there
        slots.cache.rollback(0, start)
        del slots.tokens[start:]
        slots.run(9, 9)
        slots.cache.rollback(0, start + 5)
        del slots.tokens[start + 5 :]
        assert slots.is_intact(start + 5)


def test_rejects_steps_longer_than_the_ring_was_built_for():
    cache = PagedKVCache(2, 1, 2, 300, chunk_sizes=[None, CHUNK], max_step_rows=ROWS, page_size=4)
    with pytest.raises(ValueError, match=r"13 rows in one step, but the chunked layers have room"):
        cache.causal_step(ROWS + 1)
    with pytest.raises(ValueError, match=r"with max_step_rows=13"):
        cache.tree_step(Tree(tuple(range(-1, ROWS))))
    cache.causal_step(ROWS)
    whole = PagedKVCache(2, 1, 2, 20, chunk_sizes=[None, CHUNK], max_step_rows=ROWS, page_size=4)
    whole.causal_step(20)  # shorter than the ring: there is none
