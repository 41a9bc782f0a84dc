"""Any single corruption of a draft is either reported as a CheckpointError or changes nothing.

Tensors are damaged in kind (lost, renamed, doubled, reshaped, retyped, not finite, a map edited);
any config key of any format takes any JSON value, and then the config is read or refused with the
key's name, never another exception.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.registry import load_draft
from aerie.llama4.json_fields import CheckpointError

DEPTH = 8
TAP_KEY = "eagle_aux_hidden_state_layer_ids"
LAYER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "layer_types": ["full_attention"],
    "max_position_embeddings": 64,
    "attention_bias": False,
    "mlp_bias": False,
    "no_rope_layers": [1],
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
}
TOP: dict[str, Any] = {
    "architectures": ["Eagle3DraftModel"],
    "draft_vocab_size": 32,
    "target_hidden_size": 40,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    TAP_KEY: [1, 3, 4],
    "quantization_config": None,
}
MODELOPT = {"use_last_layernorm": True, "has_lm_head": True, "parallel_draft_step": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "raw": {**LAYER, **TOP, "num_aux_layers": 3, "logit_scale": 1.0, "yoco_local_kv_layer": None},
    "llama4": {**LAYER, **TOP, "model_type": "llama4_text", "intermediate_size_mlp": 48},
    "ModelOpt": {**LAYER, **TOP, "eagle_config": {**MODELOPT, TAP_KEY: [1, 3, 4]}},
    "speculators": {
        **TOP,
        "speculators_model_type": "eagle3",
        "transformer_layer_config": LAYER,
    },
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "llama", "eagle3", "silu", "64"]),
)
VALUES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "x"]), SCALARS),
    st.lists(st.lists(SCALARS, max_size=2), max_size=2),
)


def places(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all keys, of nested objects too."""
    found = []
    for key, value in values.items():
        found.append((*path, key))
        found += places(value, (*path, key)) if isinstance(value, dict) else []
    return found


def changed(values: Mapping[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    head, *rest = path
    return {**values, head: changed(values[head], tuple(rest), value) if rest else value}


@pytest.mark.parametrize("form", CONFIGS)
def test_the_configs_are_valid(form):
    assert Eagle3Config.from_hf(CONFIGS[form], DEPTH).num_taps == 3


@pytest.mark.parametrize("form", CONFIGS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_value_of_any_key_is_read_or_refused(form, data):
    path = data.draw(st.sampled_from(places(CONFIGS[form])))
    values = changed(CONFIGS[form], path, data.draw(VALUES))
    try:
        config = Eagle3Config.from_hf(values, DEPTH)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = "config key"
        assert config.draft_vocab_size <= config.vocab_size
    assert "config key" in refusal


def other_names(name: str) -> list[str]:
    return [f"{name}.x", name.upper(), f"layers.1.{name}", f"x.{name}"]


def damage(draw, tensors: dict[str, torch.Tensor]) -> str:
    """One corruption, in place; the tensor's name."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    match draw(st.sampled_from(["lost", "renamed", "doubled", "shape", "type", "value"])):
        case "lost":
            del tensors[name]
        case "renamed":
            tensors[draw(st.sampled_from(other_names(name)))] = tensors.pop(name)
        case "doubled":
            tensors[f"model.{name}"] = tensor.clone()
        case "shape":
            shorter, flat = tensor[:-1], tensor.flatten()[None]
            tensors[name] = draw(st.sampled_from([shorter, flat])).contiguous().clone()
        case "type":
            kinds = [torch.int8, torch.uint8, torch.float64, torch.bool, torch.float8_e4m3fn]
            tensors[name] = tensor.to(draw(st.sampled_from(kinds)))
        case "value":
            place = draw(st.integers(0, tensor.numel() - 1))
            wrong = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
            if tensor.is_floating_point():
                tensor.view(-1)[place] = wrong
            else:
                tensor.view(-1)[place] += draw(st.sampled_from([-200, 200, 2**62]))
    return name


@given(data=st.data())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_damaged_tensor_is_reported(data, draft_files, make_target, tmp_path_factory):
    target = _target(make_target)
    torch.manual_seed(0)
    files = draft_files(data.draw(st.sampled_from(["llama", "llama4"])))
    files = replace(files, tensors={name: t.clone() for name, t in files.tensors.items()})
    name = damage(data.draw, files.tensors)
    with pytest.raises(CheckpointError) as error:
        load_draft(files.write(tmp_path_factory.mktemp("damaged")), target)
    assert name in str(error.value)


_made: list[Any] = []


def _target(make_target):
    """One target for all examples."""
    if not _made:
        _made.append(make_target())
    return _made[0]
