"""The draft against an independent restatement (`oracle.py`), float32, random tiny checkpoints.

The oracle takes the taps from hooks on the target's layers, recomputes every row every time and has
no cache. Regimes: both layer kinds, GQA 5:1 and none, biases, head sizes, flags, RoPE and NoPE
entries, vocabulary maps, tap ids; first pass, recycled levels, chains over rounds with partial
acceptance, the draft's own cache; the Triton kernels in the interpreter.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from aerie.eagle3.batch import Committed
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import ChainDrafter
from aerie.kernels.backend import Backend

# logits are O(10); both sides sum in float32 in different orders over a few hundred terms
TOLERANCE = 1e-5
LENGTH = 19  # beyond the target's chunk of 16, which must not reach the draft
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
ROPE = {"rope_type": "default", "rope_theta": 9.0}
BLEND = {**LLAMA3, "high_freq_factor": 4.0, "rope_theta": 50.0}
TAP_KEY = "eagle_aux_hidden_state_layer_ids"
TAPS = {TAP_KEY: [6, 1, 3]}  # any order: the taps are concatenated in ascending layer order
CHUNKED = {"layer_types": ["chunked_attention"], "attention_chunk_size": 4}
BOTH: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm_before_residual": {"norm_before_residual": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_before_fc nested": {"eagle_config": {"norm_before_fc": True}},
    "fc_norm": {"fc_norm": True},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "logit_scale": {"logit_scale": 0.25},
    "bias": {"attention_bias": True},
    "no GQA": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "head_dim derived": {"head_dim": None},
    "large eps": {"rms_norm_eps": 0.1},
    "theta explicit": {"rope_theta": 500.0},
    "theta nested": {"rope_parameters": ROPE},
    "scaling low == high": {"rope_scaling": LLAMA3},
    "scaling low < high": {"rope_parameters": BLEND},
    "full vocabulary": {"draft_vocab_size": None},
    "taps explicit": TAPS,
    "taps nested": {"eagle_config": TAPS},
    "taps at the last layer": {TAP_KEY: [0, 3, 7]},
    "no_rope_layers [0]": {"no_rope_layers": [0]},  # means nothing to the llama kind
}
ONLY_LLAMA4: dict[str, dict[str, Any]] = {
    "no QK norm": {"use_qk_norm": False},
    "no_rope_layers []": {"no_rope_layers": []},
    "no_rope_layers [1]": {"no_rope_layers": [1]},
    "padded RoPE": {"no_rope_layers": [0] * 8 + [1]},
    "padded NoPE": {"no_rope_layers": [1] * 8 + [0]},
    "chunked layer type": CHUNKED,  # as a config derives it from the target's; never applied
    "NoPE, no temperature": {"no_rope_layers": [0], "attn_temperature_tuning": False},
}
CASES = {
    **{f"llama {name}": ("llama", changes) for name, changes in BOTH.items()},
    **{f"llama4 {name}": ("llama4", changes) for name, changes in (BOTH | ONLY_LLAMA4).items()},
}
CHAIN_CASES = [
    f"{kind} {name}"
    for kind in ("llama", "llama4")
    for name in ("plain", "norm_before_residual", "EAGLE-3.1", "full vocabulary", "taps nested")
] + ["llama4 no_rope_layers [0]"]


@dataclass
class Pair:
    """One draft, ours and restated; a text and what the oracle's taps say of it."""

    ours: Eagle3Llama4ForCausalLM
    oracle: Any
    chain: Any  # the oracle of proposed chains
    next_ids: Tensor  # of the rows 0 .. LENGTH - 1: the text from its second token on
    aux: tuple[Tensor, ...]  # the target's own taps
    expected_aux: tuple[Tensor, ...]


def stream_outputs(target, ids: Tensor):
    """(our taps, the un-normed output of every layer) of one pass over `ids`."""
    outputs = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: outputs.append(out.delta_TD + out.residual_TD)
        )
        for layer in target.model.layers
    ]
    aux = target(ids, target.allocate_cache(len(ids)).causal_step(len(ids))).aux_hidden_states
    for hook in hooks:
        hook.remove()
    return aux, outputs


@pytest.fixture
def make_pair(draft_files, make_target, load_draft, oracle):
    """`make_pair(kind, backend="eager", length=LENGTH, **changes)`."""

    def make(kind: str, backend: Backend = "eager", length=LENGTH, **changes) -> Pair:
        files, target = draft_files(kind, **changes), make_target()
        ours = load_draft(files, target, backend)
        restated = oracle.DraftOracle(files.tensors, files.config, target.state_dict())
        text = torch.randint(0, 96, (length + 1,))
        aux, outputs = stream_outputs(target, text[:-1])
        layers = oracle.tapped_outputs(files.config, target.config.num_hidden_layers)
        chain = oracle.ChainOracle(restated)
        return Pair(ours, restated, chain, text[1:], aux, tuple(outputs[layer] for layer in layers))

    return make


def check_levels(pair: Pair, num_levels: int, assert_close) -> None:
    """First pass (all rows) and recycled levels, teacher-forced with the oracle's own tokens."""
    length, ours, chain = len(pair.next_ids), pair.ours, pair.chain
    chain.observe(pair.expected_aux, pair.next_ids)
    cache = ours.allocate_cache(length + num_levels, page_size=8)
    hidden, ids = ours.combine_hidden_states(pair.aux), pair.next_ids
    assert_close(hidden, chain.hidden, TOLERANCE)
    _, first = pair.oracle.forward(chain.hidden, ids, torch.arange(length))
    for level, (pre, logits, token) in enumerate(chain.levels(num_levels)):
        output = ours(ids, hidden, cache.causal_step(len(ids)))
        cache.commit(0, range(len(ids)))
        actual = ours.compute_draft_logits(output.post_norm_TD)
        if level == 0:
            assert_close(actual, first, TOLERANCE)
        assert_close(actual[-1], logits, TOLERANCE)
        assert_close(output.next_hidden_TD[-1], pre, TOLERANCE)
        assert ours.top_tokens(output.post_norm_TD[-1:], 1).ids_TA.tolist() == [[token]]
        hidden, ids = output.next_hidden_TD[-1:], torch.tensor([token])


@pytest.mark.parametrize("case", CASES)
def test_first_pass_and_recycled_levels_match(case, make_pair, assert_close):
    kind, changes = CASES[case]
    check_levels(make_pair(kind, **changes), 5, assert_close)


@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_triton_backend_matches(kind, make_pair, assert_close):
    check_levels(make_pair(kind, backend="triton", length=5), 2, assert_close)


def committed(pair: Pair, rows: slice, width: int | None = None) -> Committed:
    """Rows that a pass of the target committed; further columns are garbage."""
    count = rows.stop - rows.start
    width = count if width is None else width
    next_ids = torch.full((1, width), 95)
    next_ids[0, :count] = pair.next_ids[rows]
    taps = [torch.full((1, width, tap.shape[1]), 1e3) for tap in pair.aux]
    for garbage, tap in zip(taps, pair.aux, strict=True):
        garbage[0, :count] = tap[rows]
    columns = (torch.tensor([number]) for number in (rows.start, count, rows.stop))
    return Committed(*columns, next_ids, tuple(taps))


@pytest.mark.parametrize("case", CHAIN_CASES)
def test_chains_match_over_rounds(case, make_pair):
    """Each round commits what the target accepted (1 to 4 rows) and drafts again."""
    kind, changes = CASES[case]
    pair = make_pair(kind, length=24, **changes)
    cache, chain = pair.ours.allocate_cache(40), pair.chain
    start = 0
    for count, drafted in ((9, 4), (1, 4), (4, 6), (2, 2), (3, 1), (1, 3), (4, 5)):
        rows = slice(start, start + count)
        chain.observe([tap[rows] for tap in pair.expected_aux], pair.next_ids[rows])
        expected = [token for _, _, token in chain.levels(drafted)]
        drafter = ChainDrafter(drafted, pair.ours, cache)
        assert drafter.propose(committed(pair, rows)).tokens_BN.tolist() == [expected]
        start += count


@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_guessed_rows_are_forgotten_and_rebuilt_from_true_features(kind, make_pair):
    pair = make_pair(kind)
    drafters = [ChainDrafter(6, pair.ours, pair.ours.allocate_cache(40)) for _ in range(2)]
    drafter, fresh = drafters
    for rows in (slice(0, 8), slice(8, 11)):
        drafter.propose(committed(pair, rows))
    fresh.propose(committed(pair, slice(0, 11)))
    # slots 8..10 held guesses after the first round; one page holds all slots
    for ours, expected in (
        (drafter.cache.pools[0].k_LRCGK, fresh.cache.pools[0].k_LRCGK),
        (drafter.cache.pools[0].v_LRCGK, fresh.cache.pools[0].v_LRCGK),
    ):
        torch.testing.assert_close(ours[0, 0, :11], expected[0, 0, :11], rtol=1e-5, atol=1e-5)


def test_rows_of_no_committed_position_are_never_read(make_pair):
    """Neither slots behind the committed rows nor columns behind the accepted count."""
    pair = make_pair("llama4")
    drafter, chain = ChainDrafter(4, pair.ours, pair.ours.allocate_cache(40)), pair.chain
    for rows in (slice(0, 8), slice(8, 11)):
        drafter.cache.pools[0].k_LRCGK[:, :, rows.start :] = torch.nan
        drafter.cache.pools[0].v_LRCGK[:, :, rows.start :] = torch.nan
        chain.observe([tap[rows] for tap in pair.expected_aux], pair.next_ids[rows])
        expected = [token for _, _, token in chain.levels(4)]
        proposed = drafter.propose(committed(pair, rows, width=9))
        assert proposed.tokens_BN.tolist() == [expected]


@pytest.mark.parametrize("depth", [7, 8, 13])
def test_output_ids_of_the_default_give_the_default_taps(
    depth, draft_files, make_target, load_draft
):
    """[1, N/2 - 1, N - 4] counts outputs, (2, N/2, N - 3) the inputs behind them."""
    files, target = draft_files("llama"), make_target(num_hidden_layers=depth)
    text = torch.randint(0, 96, (LENGTH,))
    load_draft(files, target)
    default, outputs = stream_outputs(target, text)
    explicit_ids = [1, depth // 2 - 1, depth - 4]
    files.config[TAP_KEY] = explicit_ids
    load_draft(files, target)
    explicit, _ = stream_outputs(target, text)
    for tap, same, layer in zip(default, explicit, explicit_ids, strict=True):
        assert torch.equal(tap, same)
        assert torch.equal(tap, outputs[layer])


@pytest.mark.parametrize("shift", [-1, 1])
def test_taps_one_layer_off_change_the_logits(shift, draft_files, make_target, load_draft):
    """The oracle can only tell the conventions apart if a wrong one shows."""
    files, target, text = draft_files("llama"), make_target(), torch.randint(0, 96, (LENGTH + 1,))

    def logits(*layers: int) -> Tensor:
        # a flag of ModelOpt's: its ids are outputs, even where they are EAGLE's defaults for inputs
        files.config["eagle_config"] = {"use_last_layernorm": True, TAP_KEY: list(layers)}
        ours = load_draft(files, target)
        hidden = ours.combine_hidden_states(stream_outputs(target, text[:-1])[0])
        step = ours.allocate_cache(LENGTH).causal_step(LENGTH)
        return ours.compute_draft_logits(ours(text[1:], hidden, step).post_norm_TD)

    right, wrong = logits(1, 3, 4), logits(1 + shift, 3 + shift, 4 + shift)
    assert (right - wrong).abs().max() > 0.05 * right.abs().max()
