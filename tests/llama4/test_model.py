"""The target against transformers' own Llama 4, float32, on random tiny checkpoints.

Regimes: mixture of experts in every and every second layer, dense only, top-1 and top-2; QK norm on
and off; chunk edges inside the prompt, at its end and between two steps; NoPE temperature past
several floors; rope scaling with low == high and low < high; tied head; prompt, decode and
multi-token steps on the cache.
"""

import pytest
import torch

from aerie.llama4.step import Tree

# logits are O(10); both sides sum in float32 in different orders over a few hundred terms per layer
TOLERANCE = 1e-5
SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "scout": {},
    "maverick": {"interleave_moe_layer_step": 2, "use_qk_norm": False},
    "dense": {"moe_layers": []},
    "top-2": {"num_experts_per_tok": 2},
    "no temperature": {"attn_temperature_tuning": False},
    "scout rope": {"rope_parameters": SCOUT_ROPE},
    "base rope": {"rope_parameters": {**SCOUT_ROPE, "factor": 8.0, "high_freq_factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
    "all rope": {"no_rope_layers": [1, 1, 1, 1]},
    "odd sizes": {"hidden_size": 50, "intermediate_size": 33, "num_local_experts": 3},
    "mha": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32},
    "deep": {"num_hidden_layers": 9, "interleave_moe_layer_step": 3},
}


def their_logits(pair, ids):
    return pair.theirs(ids[None]).logits[0]


def our_logits(pair, ids, *steps):
    """Logits of all rows, computed in consecutive causal steps of the given sizes."""
    cache = pair.ours.allocate_cache(len(ids), page_size=8)
    logits = []
    for part in ids.split(list(steps)):
        logits.append(pair.ours(part, cache.causal_step(len(part))).logits_TV)
        cache.commit(0, range(len(part)))
    return torch.cat(logits)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(4))
def test_prompt_matches_transformers(case, seed, make_pair, assert_close):
    pair = make_pair(seed, **CASES[case])
    length = (15, 16, 17, 50)[seed]
    ids = torch.randint(0, 96, (length,))
    expected = their_logits(pair, ids)
    actual = our_logits(pair, ids, length)
    assert_close(actual, expected, TOLERANCE)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("case", CASES)
def test_decode_and_verify_steps_match_transformers(case, make_pair, assert_close):
    pair = make_pair(7, **CASES[case])
    ids = torch.randint(0, 96, (45,))
    # a prompt, single tokens, and verify-sized steps that end on, before and across chunk edges
    actual = our_logits(pair, ids, 13, 1, 1, 1, 1, 5, 6, 3, 1, 8, 5)
    assert_close(actual, their_logits(pair, ids), TOLERANCE)


@pytest.mark.parametrize("case", ["scout", "maverick", "scout rope"])
def test_greedy_ids_match_transformers_generate(case, make_pair):
    pair = make_pair(3, **CASES[case])
    ids = torch.randint(3, 96, (14,))
    theirs = pair.theirs.generate(ids[None], max_new_tokens=40, do_sample=False, eos_token_id=None)[
        0, 14:
    ]
    cache = pair.ours.allocate_cache(60)
    ours, step_ids = [], ids
    for _ in range(40):
        output = pair.ours(step_ids, cache.causal_step(len(step_ids)))
        cache.commit(0, range(len(step_ids)))
        step_ids = output.logits_TV[-1:].argmax(-1)
        ours.append(int(step_ids))
    assert ours == theirs.tolist()


def test_triton_backend_matches_transformers(make_pair, assert_close):
    pair = make_pair(5, backend="triton", interleave_moe_layer_step=2)
    ids = torch.randint(0, 96, (20,))
    assert_close(our_logits(pair, ids, 14, 1, 5), their_logits(pair, ids), TOLERANCE)


def test_tree_rows_equal_their_own_paths(make_pair, assert_close):
    """A node of a tree that straddles a chunk edge sees what it would in a plain sequence."""
    pair = make_pair(11)
    parents = (-1, 0, 0, 1, 1, 2, 3, 6, 6)
    prefix, nodes = torch.randint(0, 96, (14,)), torch.randint(0, 96, (len(parents),))
    cache = pair.ours.allocate_cache(40, page_size=8)
    pair.ours(prefix, cache.causal_step(14))
    cache.commit(0, range(14))
    logits = pair.ours(nodes, cache.tree_step(Tree(parents))).logits_TV
    for row in range(len(parents)):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        alone = their_logits(pair, torch.cat((prefix, nodes[path])))[-1]
        assert_close(logits[row], alone, TOLERANCE)


def test_sequences_of_a_batch_do_not_mix(make_pair, assert_close):
    pair = make_pair(13)
    first, second = torch.randint(0, 96, (11,)), torch.randint(0, 96, (19,))
    cache = pair.ours.allocate_cache(32, num_sequences=2, page_size=8)
    logits = pair.ours(torch.cat((first, second)), cache.causal_step(11, 19)).logits_TV
    assert_close(logits[:11], their_logits(pair, first), TOLERANCE)
    assert_close(logits[11:], their_logits(pair, second), TOLERANCE)


def test_taps_are_the_inputs_of_layers(make_pair, assert_close):
    """`hidden_states[i]` of transformers is the un-normed input of layer i."""
    pair = make_pair(17)
    ids = torch.randint(0, 96, (12,))
    pair.ours.set_aux_hidden_state_layers((3, 0, 2))
    taps = pair.ours(ids, pair.ours.allocate_cache(12).causal_step(12)).aux_hidden_states
    hidden = pair.theirs(ids[None], output_hidden_states=True).hidden_states
    for tap, layer in zip(taps, (0, 2, 3), strict=True):
        assert_close(tap, hidden[layer][0], TOLERANCE)


def test_a_pass_can_name_its_own_taps(make_pair):
    """They come in ascending order, and the next pass without any taps where it did before."""
    model, ids = make_pair(17).ours, torch.randint(0, 96, (12,))

    def taps(aux_layers=None):
        step = model.allocate_cache(12).causal_step(12)
        return model(ids, step, aux_layers=aux_layers).aux_hidden_states

    model.set_aux_hidden_state_layers((0, 1, 2, 3, 4))
    every = taps()
    for layers in ((3, 0, 4), (), (1,)):
        for tap, layer in zip(taps(layers), sorted(layers), strict=True):
            assert torch.equal(tap, every[layer])
    assert len(taps()) == 5


def test_last_tap_is_not_normed(make_pair, assert_close):
    pair = make_pair(19)
    pair.ours.set_aux_hidden_state_layers((4,))
    ids = torch.randint(0, 96, (6,))
    (tap,) = pair.ours(ids, pair.ours.allocate_cache(6).causal_step(6)).aux_hidden_states
    captured = []
    pair.theirs.model.norm.register_forward_pre_hook(lambda _, args: captured.append(args[0][0]))
    their_logits(pair, ids)
    assert_close(tap, captured[0], TOLERANCE)


def test_default_taps_have_both_names(make_pair):
    model = make_pair(23, num_hidden_layers=8).ours
    assert model.get_eagle3_default_aux_hidden_state_layers() == (2, 4, 5)
    assert model.get_eagle3_aux_hidden_state_layers() == (2, 4, 5)


def test_rejects_taps_outside(make_pair):
    model = make_pair(29).ours
    for layers in ((0, 5), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="distinct and within 0..4"):
            model.set_aux_hidden_state_layers(layers)
        step = model.allocate_cache(2).causal_step(1)
        with pytest.raises(ValueError, match="distinct and within 0..4"):
            model(torch.tensor([1]), step, aux_layers=layers)


def test_rejects_ids_that_are_not_one_for_every_row(make_pair):
    model = make_pair(31).ours
    for shape in ([1, 3], [1], [4]):
        step = model.allocate_cache(8).causal_step(3)
        with pytest.raises(ValueError, match=r"input_ids_T: must be \[3\], an id for every row"):
            model(torch.zeros(shape, dtype=torch.int64), step)
