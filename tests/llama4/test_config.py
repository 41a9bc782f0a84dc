"""Reading a target's `config.json`: upstream's variants are understood, everything else is named.

A rejection is a CheckpointError whose one sentence holds the key (or file) and the value.
"""

import json
from typing import Any

import pytest

from aerie.kernels.rotation import Llama3Scaling
from aerie.llama4.config import Llama4Config
from aerie.llama4.json_fields import CheckpointError

VALUES: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "max_position_embeddings": 256,
}
REQUIRED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_mlp",
    "num_hidden_layers",
    "num_attention_heads",
    "num_local_experts",
    "max_position_embeddings",
]
SCALING = {
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3 = {"rope_type": "llama3", **SCALING}
VISION = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"}


def read(**changes) -> Llama4Config:
    return Llama4Config.from_hf({**VALUES, **changes})


def test_defaults_are_llama4s():
    config = read()
    assert config.moe_layers == (0, 1, 2, 3)
    assert config.no_rope_layers == (1, 1, 1, 0)
    assert config.chunked_layers == (True, True, True, False)
    assert (config.attention_chunk_size, config.num_experts_per_tok) == (8192, 1)
    assert (config.rope.theta, config.rope.scaling) == (500000.0, None)
    assert config.temperature is not None
    assert (config.temperature.floor_scale, config.temperature.scale) == (8192.0, 0.1)
    assert config.use_qk_norm
    assert not config.attention_bias
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"interleave_moe_layer_step": 2}, "moe_layers", (1, 3)),
        ({"interleave_moe_layer_step": 5}, "moe_layers", ()),
        ({"moe_layers": []}, "moe_layers", ()),
        ({"moe_layers": None, "interleave_moe_layer_step": 4}, "moe_layers", (3,)),
        ({"no_rope_layers": []}, "no_rope_layers", (1, 1, 1, 0)),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layers", (1, 0, 1, 0)),
        ({"no_rope_layers": [0, 1, 1, 1]}, "chunked_layers", (False, True, True, True)),
        ({"layer_types": ["full_attention"] * 4}, "chunked_layers", (False,) * 4),
        ({"attention_chunk_size": None}, "attention_chunk_size", None),
        ({"attn_temperature_tuning": False}, "temperature", None),
        ({"attn_temperature_tuning": 0}, "temperature", None),
        ({"eos_token_id": 2}, "eos_token_ids", (2,)),
        ({"eos_token_id": [2, 7]}, "eos_token_ids", (2, 7)),
        ({"num_key_value_heads": None}, "num_key_value_heads", 10),
        ({"head_dim": None}, "head_dim", 6),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_derived_fields(changes, field, expected):
    assert getattr(read(**changes), field) == expected


@pytest.mark.parametrize("tuning", [True, 1, 4])
def test_temperature_flag_may_be_an_integer(tuning):
    assert read(attn_temperature_tuning=tuning).temperature is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 9.0, "rope_scaling": LLAMA3},
        {"rope_theta": 9, "rope_scaling": {**SCALING, "type": "llama3"}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 9.0}},
        {
            "rope_parameters": {**LLAMA3, "rope_theta": 9.0},
            "rope_scaling": {**SCALING, "type": "llama3"},
        },
    ],
    ids=["transformers 4", "older type key", "transformers 5", "both, alike"],
)
def test_rope_layouts(changes):
    rope = read(**changes).rope
    assert (rope.theta, rope.scaling) == (9.0, Llama3Scaling(16.0, 1.0, 1.0, 8192))


def test_multimodal_config_gives_its_text_part():
    text = {k: v for k, v in VALUES.items() if k != "architectures"}
    assert Llama4Config.from_hf({**VISION, "text_config": text}) == read()


@pytest.mark.parametrize("key", REQUIRED)
def test_rejects_missing_key(key):
    with pytest.raises(CheckpointError, match=rf"'{key}': missing"):
        Llama4Config.from_hf({k: v for k, v in VALUES.items() if k != key})


@pytest.mark.parametrize("value", ["64", 64.0, True, 0, -1, [64], {}], ids=repr)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "head_dim"])
def test_rejects_wrong_integer(key, value):
    with pytest.raises(CheckpointError) as error:
        read(**{key: value})
    assert f"'{key}': must be an integer >= 1, got {value!r}" in str(error.value)


REJECTED = {
    "eps is text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps", "'1e-5'"),
    "eps is zero": ({"rms_norm_eps": 0}, "rms_norm_eps", "got 0"),
    "eps is NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "nan"),
    "theta is infinite": ({"rope_theta": float("inf")}, "rope_theta", "inf"),
    "theta is true": ({"rope_theta": True}, "rope_theta", "True"),
    "flag is text": ({"use_qk_norm": "yes"}, "use_qk_norm", "'yes'"),
    "heads not divisible": ({"num_key_value_heads": 3}, "num_key_value_heads 3", "10"),
    "odd head_dim": ({"head_dim": 15}, "head_dim", "15"),
    "more experts per token": ({"num_experts_per_tok": 5}, "num_experts_per_tok", "5"),
    "moe_layers beyond": ({"moe_layers": [0, 4]}, "moe_layers", "(0, 4)"),
    "moe_layers negative": ({"moe_layers": [-1]}, "moe_layers", "(-1,)"),
    "moe_layers twice": ({"moe_layers": [1, 1]}, "moe_layers", "(1, 1)"),
    "moe_layers text": ({"moe_layers": "all"}, "moe_layers", "'all'"),
    "no_rope_layers short": ({"no_rope_layers": [1, 0]}, "no_rope_layers", "4 entries"),
    "no_rope_layers long": ({"no_rope_layers": [1] * 5}, "no_rope_layers", "4 entries"),
    "no_rope_layers of 2": ({"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers", "2"),
    "no_rope_layers flags": ({"no_rope_layers": [True] * 4}, "no_rope_layers", "True"),
    "layer_types unknown": ({"layer_types": ["x"] * 4}, "layer_types", "'x'"),
    "layer_types short": ({"layer_types": ["full_attention"]}, "layer_types", "4 of"),
    "chunk of zero": ({"attention_chunk_size": 0}, "attention_chunk_size", "got 0"),
    "rope type": ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type", "'yarn'"),
    "rope text": ({"rope_parameters": "default"}, "rope_parameters", "'default'"),
    "rope incomplete": ({"rope_scaling": {"rope_type": "llama3"}}, "factor", "missing"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act", "'gelu'"),
    "text_config text": ({**VISION, "text_config": "x"}, "text_config", "'x'"),
    "text_config empty": ({**VISION, "text_config": {}}, "num_hidden_layers", "missing"),
    "another model": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        "MistralForCausalLM",
        "Llama4ForCausalLM",
    ),
    "no model at all": ({"architectures": None, "model_type": None}, "architectures", "None"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects(case):
    changes, key, value = REJECTED[case]
    with pytest.raises(CheckpointError) as error:
        read(**changes)
    assert key in str(error.value)
    assert value in str(error.value)


MALFORMED = {
    "architectures number": ({"architectures": 5}, "architectures", "5"),
    "architectures objects": ({"architectures": [{}]}, "architectures", "[{}]"),
    "layer_types objects": ({"layer_types": [{}] * 4}, "layer_types", "{}"),
    "theta beyond floats": ({"rope_theta": 10**400}, "rope_theta", "1000"),
    "width beyond integers": ({"hidden_size": 10**30}, "hidden_size", "1000"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_rejects_malformed(case):
    changes, key, value = MALFORMED[case]
    with pytest.raises(CheckpointError) as error:
        read(model_type=None, **changes)
    assert key in str(error.value)
    assert value in str(error.value)


FILES = {
    "missing": (None, "no such file"),
    "empty": (b"", "not valid JSON"),
    "truncated": (b'{"hidden_size": 6', "not valid JSON"),
    "not JSON": (b"hidden_size: 64", "not valid JSON"),
    "not text": (b"\xff\xfe\x00{", "not valid JSON"),
    "a list": (b"[1, 2]", "must hold a JSON object, got list"),
    "nested too deep": (b"[" * 100_000, "not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_rejects_file(case, tmp_path):
    content, message = FILES[case]
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Llama4Config.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_end_tokens_come_from_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**VALUES, "eos_token_id": 2}))
    assert Llama4Config.from_pretrained(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert Llama4Config.from_pretrained(tmp_path).eos_token_ids == (3, 4)
