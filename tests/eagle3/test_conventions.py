"""Tap ids and their two conventions: who wrote a file decides, an override wins, both are shown.

Ids tell by themselves where they are EAGLE's defaults, where one is the target's depth, and where
AngelSlim wrote them under both of its keys (its `online_eagle3_trainer.py` reads the one, outputs
by `hidden_states[id + 1]`, and vLLM the other). Sources of the raw cases: sglang#25454, #32334.
"""

import logging

import pytest

from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.conventions import show_taps
from aerie.eagle3.reading import AS_WRITTEN, Reading
from aerie.llama4.json_fields import CheckpointError

TAP_KEY = "eagle_aux_hidden_state_layer_ids"
ANGELSLIM_KEY = "aux_hidden_states_layer_ids"
DEPTH = 48
LAYER = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
}
RAW = {"architectures": ["LlamaForCausalLMEagle3"], **LAYER}
MODELOPT = {**RAW, "eagle_config": {"use_last_layernorm": True}}


def speculators(architecture: str) -> dict:
    return {
        "architectures": [architecture],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": LAYER,
        "draft_vocab_size": 96,
    }


PRODUCERS = {
    "SpecForge": (RAW, [1, 23, 44], (2, 24, 45)),
    "SpecForge, other layers": (RAW, [1, 20, 40], (2, 21, 41)),
    "raw, EAGLE's defaults": (RAW, [2, 24, 45], (2, 24, 45)),
    "raw, the last state": (RAW, [24, 36, 48], (24, 36, 48)),
    "ModelOpt": (MODELOPT, [1, 23, 44], (2, 24, 45)),
    "ModelOpt, other layers": (MODELOPT, [2, 24, 45], (3, 25, 46)),
    "ModelOpt, the last state": (MODELOPT, [24, 36, 48], (24, 36, 48)),
    "AngelSlim, both keys": ({**RAW, ANGELSLIM_KEY: [1, 20, 40]}, [2, 21, 41], (2, 21, 41)),
    "speculators, trained": (speculators("Eagle3DraftModel"), [2, 24, 45], (2, 24, 45)),
    "speculators, trained elsewhere": (speculators("Eagle3DraftModel"), [1, 23, 44], (1, 23, 44)),
    "speculators, the last state": (speculators("Eagle3DraftModel"), [2, 24, 48], (2, 24, 48)),
    "converted from NVIDIA's": (speculators("Eagle3Speculator"), [1, 23, 44], (2, 24, 45)),
    "older training": (speculators("Eagle3Speculator"), [2, 24, 45], (2, 24, 45)),
}


def read(values: dict, reading: Reading = AS_WRITTEN) -> Eagle3Config:
    return Eagle3Config.from_hf(values, DEPTH, reading)


@pytest.mark.parametrize("case", PRODUCERS)
def test_the_producer_decides(case):
    values, ids, inputs = PRODUCERS[case]
    config = read({**values, TAP_KEY: ids})
    assert config.aux_hidden_state_layers == inputs
    (decision,) = (d for d in config.decisions if d.topic == "taps")
    assert str(ids) in decision.reason
    assert decision.choice == show_taps(inputs)
    assert decision.level == logging.INFO  # said in the log when ids are read


@pytest.mark.parametrize("case", PRODUCERS)
def test_an_override_wins(case):
    values, ids, _ = PRODUCERS[case]
    as_inputs = read({**values, TAP_KEY: ids}, Reading(tap_convention="input_to"))
    as_outputs = read({**values, TAP_KEY: ids}, Reading(tap_convention="output_of"))
    assert as_inputs.aux_hidden_state_layers == tuple(ids)
    assert as_outputs.aux_hidden_state_layers == tuple(i + 1 for i in ids)
    other = Reading(tap_ids=(5, 6, 7), tap_convention="output_of")
    assert read({**values, TAP_KEY: ids}, other).aux_hidden_state_layers == (6, 7, 8)


def test_raw_ids_that_servers_read_otherwise_are_a_warning():
    config = read({**RAW, TAP_KEY: [4, 20, 40]})
    assert config.aux_hidden_state_layers == (5, 21, 41)
    (decision,) = (d for d in config.decisions if d.topic == "taps")
    assert decision.level == logging.WARNING
    assert "SGLang and vLLM read ids that do not begin with 1 as inputs" in decision.reason


def test_angelslims_own_key_names_outputs():
    assert read({**RAW, ANGELSLIM_KEY: [1, 20, 40]}).aux_hidden_state_layers == (2, 21, 41)


def test_angelslims_keys_must_agree():
    with pytest.raises(CheckpointError, match=r"\[3, 21, 41\] and \[1, 20, 40\] name different"):
        read({**RAW, TAP_KEY: [3, 21, 41], ANGELSLIM_KEY: [1, 20, 40]})


def test_norm_output_false_had_another_meaning_once():
    """SpecForge#879: until then its head read what `norm_output` false left un-normed."""
    (decision,) = (d for d in read({**RAW, "norm_output": False}).decisions if "norm_o" in d.topic)
    assert "SpecForge before September 2026" in decision.reason
    assert decision.level == logging.INFO


def test_nested_ids_are_read():
    nested = {**MODELOPT["eagle_config"], TAP_KEY: [1, 23, 44]}
    assert read({**MODELOPT, "eagle_config": nested}).aux_hidden_state_layers == (2, 24, 45)


def test_the_default_is_said_to_be_one():
    config = read(RAW)
    assert config.aux_hidden_state_layers is None
    (decision,) = (d for d in config.decisions if d.topic == "taps")
    assert decision.choice == ("inputs to layers 2, 24, 45 = outputs of layers 1, 23, 44")
    assert "the default" in decision.reason


def test_the_input_to_layer_0_is_the_embeddings():
    assert show_taps((0, 5)) == "inputs to layers 0, 5 = outputs of layers embeddings, 4"


@pytest.mark.parametrize(
    ("changes", "choice", "reason", "level"),
    [
        ({}, "10000", "the config names none", logging.INFO),
        ({"rope_theta": 500.0}, "500", "top level", logging.DEBUG),
        ({"rope_parameters": {"rope_theta": 7.0}}, "7", "rope_parameters", logging.DEBUG),
        (
            {"rope_theta": 500.0, "rope_scaling": {"rope_type": "default", "rope_theta": 7.0}},
            "7",
            "rope_scaling, while the top level says 500",
            logging.WARNING,
        ),
    ],
    ids=["absent", "top", "nested", "contradiction"],
)
def test_the_origin_of_theta(changes, choice, reason, level):
    (decision,) = (d for d in read({**RAW, **changes}).decisions if d.topic == "rope_theta")
    assert decision.choice == choice
    assert reason in decision.reason
    assert decision.level == level


BAD = {
    "convention": ({"tap_convention": "inputs"}, "tap_convention: must be one of output_of"),
    "ids without one": ({"tap_ids": [1, 2]}, "tap_ids: say what they count"),
    "ids as text": ({"tap_ids": "1,2", "tap_convention": "input_to"}, "tap_ids: must be a list"),
    "ids of text": ({"tap_ids": ["1"], "tap_convention": "input_to"}, "tap_ids: must be layer"),
    "layout": ({"rotary_layout": "halves"}, "rotary_layout: must be one of interleaved, half"),
    "flag": ({"norm_output": 1}, "norm_output: must be true or false, got 1"),
    "map": ({"vocabulary_map": {}}, "vocabulary_map: must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_overrides_are_checked(case):
    values, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Reading.from_dict(values)


def test_overrides_go_through_json_and_back():
    values = {"tap_ids": [1, 2, 3], "tap_convention": "input_to", "norm_output": False}
    assert Reading.from_dict(values).as_dict() == values
