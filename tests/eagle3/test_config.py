"""Reading a raw draft's `config.json`: what both layer kinds mean, and everything else is named.

A rejection is a CheckpointError whose one sentence holds the key (or file) and the value. Defects
that only show as a draft which is never accepted are refused here.
"""

import json
from logging import WARNING

import pytest

from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.config_fields import draft_no_rope_entry
from aerie.eagle3.reading import AS_WRITTEN, Reading
from aerie.llama4.attention_config import Temperature
from aerie.llama4.json_fields import CheckpointError

DEPTH = 8  # of the target
TAP_KEY = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture
def read(draft_config):
    """`read(kind, reading=AS_WRITTEN, **changes)`: the config for a target of 8 layers."""
    return lambda kind, reading=AS_WRITTEN, **changes: Eagle3Config.from_hf(
        draft_config(kind, **changes), DEPTH, reading
    )


def test_llama_kind(read):
    config = read("llama", no_rope_layers=[0], use_qk_norm=True, attention_chunk_size=4)
    assert (config.layer_kind, config.intermediate_size) == ("llama", 56)
    attention = config.attention
    assert (attention.input_size, attention.hidden_size) == (80, 40)
    assert (attention.rotary_layout, attention.qk_norm_eps) == ("half", None)
    assert (attention.temperature, attention.chunk_size) == (None, None)


def test_llama4_kind(read):
    config = read("llama4", attention_chunk_size=4)
    assert (config.layer_kind, config.intermediate_size) == ("llama4", 48)
    attention = config.attention
    assert (attention.rotary_layout, attention.qk_norm_eps) == ("interleaved", 1e-5)
    assert (attention.temperature, attention.chunk_size) == (None, None)


def test_what_transformers_derives_for_one_layer_is_accepted(read):
    """A MoE draft is known by its tensors, and no draft is chunked."""
    derived = {"moe_layers": [0], "layer_types": ["chunked_attention"], "attention_chunk_size": 4}
    assert read("llama4", **derived) == read("llama4")


def test_llama4_kind_without_rope(read):
    attention = read("llama4", no_rope_layers=[0]).attention
    assert (attention.rotary_layout, attention.qk_norm_eps) == (None, None)
    assert attention.temperature == Temperature(4.0, 0.3)


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"norm_output": True}, False),  # SpecForge's norm in front of lm_head
        ({"norm_output": True, "norm_before_fc": True}, False),
        ({"eagle_config": {"norm_output": True}}, False),
        ({"norm_output": True, "fc_norm": True}, True),  # EAGLE-3.1
    ],
    ids=str,
)
def test_norm_output_has_two_meanings(changes, theirs, read):
    """A doubtful file is read as plain EAGLE-3, says so, and can be overridden."""
    config = read("llama", **changes)
    assert config.norm_output == theirs
    warned = [d for d in config.decisions if d.topic == "norm_output" and d.level >= WARNING]
    assert bool(warned) != theirs
    assert read("llama", reading=Reading(norm_output=True), **changes).norm_output


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ((), 1),
        ((1,), 1),
        ((0,), 0),
        ((0,) * DEPTH + (1,), 1),
        ((1,) * DEPTH + (0,), 0),
    ],
    ids=str,
)
def test_no_rope_entry(entries, expected):
    assert draft_no_rope_entry(entries, DEPTH) == expected


@pytest.mark.parametrize("length", [2, DEPTH, DEPTH + 2])
def test_rejects_no_rope_layers_of_another_length(length, read):
    with pytest.raises(CheckpointError, match=r"'no_rope_layers': must be one entry .* or 9 \("):
        read("llama4", no_rope_layers=[1] * length)


def test_defaults(read):
    config = read("llama", draft_vocab_size=None, rms_norm_eps=None, num_key_value_heads=None)
    assert (config.draft_vocab_size, config.target_hidden_size) == (96, 40)
    assert (config.rope.theta, config.rope.scaling) == (10000.0, None)
    assert (config.num_taps, config.aux_hidden_state_layers) == (3, None)
    assert (config.rms_norm_eps, config.attention.num_kv_heads) == (1e-6, 10)
    assert read("llama4", rms_norm_eps=None).rms_norm_eps == 1e-5
    assert not config.norm_before_residual


@pytest.mark.parametrize(
    ("changes", "taps"),
    [
        ({TAP_KEY: [1, 3, 4]}, (2, 4, 5)),  # a file's ids count outputs, the config's inputs
        ({"eagle_config": {TAP_KEY: [1, 3, 6]}}, (2, 4, 7)),
        ({TAP_KEY: [1, 3, 4], "eagle_config": {TAP_KEY: [1, 3, 6]}}, (2, 4, 5)),
        ({TAP_KEY: []}, None),
        ({"eagle_config": {}}, None),
    ],
    ids=["top", "nested", "top wins", "empty", "empty nested"],
)
def test_tap_ids(changes, taps, read):
    assert read("llama", **changes).aux_hidden_state_layers == taps


@pytest.mark.parametrize("key", ["num_aux_hidden_states", "num_aux_layers", "aux_state_multiplier"])
def test_tap_count_keys(key, read):
    assert read("llama", **{key: 2}).num_taps == 2


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_rejects_missing_key(key, read):
    with pytest.raises(CheckpointError, match=rf"'{key}': missing"):
        read("llama", **{key: None})


@pytest.mark.parametrize("value", ["64", 64.0, True, 0, -1, [64]], ids=repr)
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "draft_vocab_size", "num_aux_layers"])
def test_rejects_wrong_integer(key, value, read):
    with pytest.raises(CheckpointError) as error:
        read("llama", **{key: value})
    assert f"'{key}': must be an integer >= 1, got {value!r}" in str(error.value)


YARN = {"rope_type": "yarn"}
WHOLE_YARN = {**YARN, "factor": 32.0, "original_max_position_embeddings": 2048}
CROSSED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 4.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}
REJECTED = {
    "unknown architecture": ({"architectures": ["MedusaModel"]}, "MedusaModel", "supported are"),
    "no architecture": ({"architectures": None}, "'architectures'", "supported are"),
    "EAGLE-1": (
        {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None},
        "'LlamaForCausalLM'",
        "Eagle3",
    ),
    "two layers": ({"num_hidden_layers": 2}, "num_hidden_layers", "exactly 1"),
    "yoco global": ({"yoco_global_kv_layer": 3}, "yoco_global_kv_layer", "3"),
    "yoco local": ({"yoco_local_kv_layer": 3}, "yoco_local_kv_layer", "3"),
    "window text": ({"sliding_window": "2048"}, "sliding_window", "'2048'"),
    "ModelOpt flag": (
        {"eagle_config": {"use_mtp_layernorm": True}},
        "'use_mtp_layernorm': True",
        "supported is False",
    ),
    "layer of another model": ({"model_type": "qwen3"}, "model_type", "'qwen3'"),
    "two norms": ({"norm_before_fc": True, "fc_norm": True}, "norm_before_fc", "fc_norm"),
    "logit scale text": ({"logit_scale": "1"}, "logit_scale", "'1'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
    "flag is text": ({"norm_before_residual": "no"}, "norm_before_residual", "'no'"),
    "eps is text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps", "'1e-5'"),
    "heads not divisible": ({"num_key_value_heads": 3}, "num_key_value_heads 3", "10"),
    "odd head_dim": ({"head_dim": 5}, "head_dim", "5"),
    "large vocabulary": ({"draft_vocab_size": 97}, "draft_vocab_size", "97"),
    "rope type": ({"rope_scaling": {"rope_type": "linear"}}, "rope_type", "'linear'"),
    "YaRN without its factor": ({"rope_scaling": YARN}, "'factor'", "missing"),
    "YaRN of theta 1": ({"rope_scaling": WHOLE_YARN, "rope_theta": 1}, "'rope_theta'", "got 1"),
    "YaRN bounds crossed": (
        {"rope_scaling": {**WHOLE_YARN, "beta_fast": 1, "beta_slow": 2}},
        "'beta_slow'",
        "exceed beta_fast 1",
    ),
    "rope by layer type": (
        {"rope_parameters": {"full_attention": YARN}},
        "rope_parameters",
        "flat",
    ),
    "two rope sections": (
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
            "rope_scaling": WHOLE_YARN,
        },
        "'rope_parameters' and 'rope_scaling'",
        "remove the one",
    ),
    "rope bands crossed": ({"rope_scaling": CROSSED}, "low_freq_factor", "high_freq_factor 1.0"),
    "part of a head": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor", "0.25"),
    "part of a head, nested": (  # AngelSlim's head for Qwen3.5-9B, of whose heads a quarter turns
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "partial_rotary_factor",
        "0.25",
    ),
    "theta is text": ({"rope_theta": "10000"}, "rope_theta", "'10000'"),
    "nested theta is text": ({"rope_parameters": {"rope_theta": "1"}}, "rope_theta", "'1'"),
    "tap ids text": ({TAP_KEY: "2,4,5"}, TAP_KEY, "'2,4,5'"),
    "tap ids floats": ({TAP_KEY: [2.0, 4.0, 5.0]}, TAP_KEY, "2.0"),
    "nested tap ids text": ({"eagle_config": {TAP_KEY: ["2"]}}, TAP_KEY, "'2'"),
    "tap count": ({TAP_KEY: [2, 4], "num_aux_layers": 3}, TAP_KEY, "3"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects(case, read):
    changes, key, value = REJECTED[case]
    with pytest.raises(CheckpointError) as error:
        read("llama", **changes)
    assert key in str(error.value)
    assert value in str(error.value)


IGNORED = {
    "yoco layer 0": ({"yoco_global_kv_layer": 0}, "yoco_global_kv_layer"),
    "sliding layers": ({"layer_types": ["sliding_attention"]}, "sliding_window"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "parallel drafting": ({"parallel_drafting": True}, "parallel_drafting"),
    "no taps": ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "contradiction": (
        {"norm_before_residual": False, "eagle_config": {"norm_before_residual": True}},
        "norm_before_residual",
    ),
    "eagle_config text": ({"eagle_config": "x"}, "eagle_config"),
    "architectures number": ({"architectures": 5}, "architectures"),
    "architectures objects": ({"architectures": [{}]}, "architectures"),
}


@pytest.mark.parametrize("case", IGNORED)
def test_rejects_what_would_be_ignored(case, read):
    changes, key = IGNORED[case]
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        read("llama", **changes)


@pytest.mark.parametrize("entry", [7, -1])
def test_rejects_no_rope_entry_that_is_no_flag(entry, read):
    with pytest.raises(CheckpointError, match=rf"'no_rope_layers'.*{entry}"):
        read("llama4", no_rope_layers=[entry])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"no_rope_layers": [0.0]}, "no_rope_layers"),
        ({"no_rope_layers": "0"}, "no_rope_layers"),
        ({"no_rope_layers": [0], "floor_scale": 0}, "floor_scale"),
        ({"no_rope_layers": [0], "attn_scale": "0.1"}, "attn_scale"),
        ({"use_qk_norm": "yes"}, "use_qk_norm"),
        ({"layer_types": ["sliding_attention"]}, "sliding_window"),
        ({"intermediate_size_mlp": "48"}, "intermediate_size_mlp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_llama4_kind_rejects(changes, key, read):
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        read("llama4", **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not valid JSON"),
        (b'{"hidden_size": 6', "not valid JSON"),
        (b"[1]", "must hold a JSON object, got list"),
    ],
    ids=["missing", "empty", "truncated", "a list"],
)
def test_rejects_file(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Eagle3Config.from_pretrained(tmp_path, DEPTH)
    assert str(tmp_path / "config.json") in str(error.value)


def test_reads_the_file(tmp_path, draft_config, read):
    (tmp_path / "config.json").write_text(json.dumps(draft_config("llama4")))
    assert Eagle3Config.from_pretrained(tmp_path, DEPTH) == read("llama4")


def test_lists_every_wrong_key(read):
    with pytest.raises(CheckpointError) as error:
        read("llama", hidden_size=None, rms_norm_eps="x", num_hidden_layers=2, hidden_act="gelu")
    lines = str(error.value).split("\n  ")
    for key in ("hidden_size", "rms_norm_eps", "num_hidden_layers", "hidden_act"):
        assert sum(key in line for line in lines) == 1


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 12}, 12),
        ({"sliding_window": 12, "layer_types": ["sliding_attention"]}, 12),
        ({"sliding_window": 12, "layer_types": ["full_attention"]}, None),
    ],
    ids=str,
)
def test_attention_window(changes, window, read):
    assert read("llama", **changes).attention_window == window
