"""Bad inputs by class: where each row of the table in reliability.md is tested, and the rest of it.

The table is a sample of its classes. The classes themselves are walked by the property tests:
headers and indexes in tests/llama4/test_file_fuzz.py, targets in tests/llama4/test_corruption.py,
drafts and their configs in tests/eagle3/test_corruption.py.
"""

import ast
import json
import logging
import os
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from typer.testing import CliRunner

from aerie.cli import app
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.eagle3.sampling import SamplingParams
from aerie.embedded import DRAFT, TARGET
from aerie.llama4.config import Llama4Config
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM
from tests.llama4.test_checkpoint import (
    EXPERTS,
    FILE,
    INDEX,
    UP,
    VALUES,
    load,
    one_by_one,
    random_tensors,
    rejection,
    write,
    write_shards,
)
from tests.llama4.test_stored_tensors import A, B, write_header
from tests.test_imports import imported_modules

ROOT = Path(__file__).parents[1]
HERE = "test_bad_inputs.py"
CHECKPOINT, STORED = "llama4/test_checkpoint.py", "llama4/test_stored_tensors.py"
CONFIG, FP8_FORMATS = "llama4/test_config.py", "llama4/test_fp8_formats.py"
DRAFTS, MAPS = "eagle3/test_checkpoint.py", "eagle3/test_vocabulary_map.py"
SAMPLED, LOSSLESS = "test_sampled_lossless.py", "test_lossless.py"
ROWS: dict[int, str] = {  # row of the table -> file and test that holds it
    1: f"{CHECKPOINT} test_rejects_file_of_another_format",
    2: f"{CHECKPOINT} test_rejects_truncated_file",
    3: f"{STORED} test_header_that_announces_more_than_there_is",
    4: f"{HERE} test_header_that_is_no_text",
    5: f"{STORED} test_rejects_header",
    6: f"{HERE} test_offsets_past_the_end",
    7: f"{STORED} test_rejects_header",
    8: f"{STORED} test_rejects_header",
    9: f"{STORED} test_rejects_header",
    10: f"{HERE} test_tensor_without_elements",
    11: f"{STORED} test_rejects_header",
    12: f"{HERE} test_tensor_names_are_no_paths",
    13: f"{CHECKPOINT} test_rejects_file_of_another_format",
    14: f"{CHECKPOINT} test_rejects_file_of_another_format",
    15: f"{STORED} test_file_that_shrinks_after_its_header_was_read",
    16: f"{CHECKPOINT} test_rejects_index_that_points_elsewhere",
    17: f"{STORED} test_rejects_link_out_of_the_folder",
    18: f"{CHECKPOINT} test_rejects_index_that_names_the_wrong_shard",
    19: f"{CHECKPOINT} test_rejects_index_that_names_a_tensor_no_shard_holds",
    20: f"{CHECKPOINT} test_rejects_index_without_map",
    21: f"{STORED} test_rejects_pickled_shard",
    22: f"{CHECKPOINT} test_rejects_tensor_in_two_shards",
    23: f"{HERE} test_index_of_very_many_tensors",
    24: f"{HERE} test_shard_names_that_are_other_names_elsewhere",
    25: f"{HERE} test_one_layer_without_experts",
    26: f"{CHECKPOINT} test_lists_all_that_is_wrong",
    27: f"{CHECKPOINT} test_lists_all_that_is_wrong",
    28: f"{CHECKPOINT} test_rejects_weight_that_is_not_finite_in_the_asked_dtype",
    29: f"{HERE} test_experts_of_bytes_without_a_quantisation",
    30: f"{FP8_FORMATS} test_rejects_tensors",
    31: f"{HERE} test_mixed_types_are_cast_and_said",
    32: f"{CHECKPOINT} test_rejects_more_experts_than_the_config_has",
    33: f"{CHECKPOINT} test_lists_all_that_is_wrong",
    34: f"{HERE} test_matrices_of_nothing_are_said",
    35: f"{CONFIG} test_rejects_file",
    36: f"{CONFIG} test_rejects_wrong_integer",
    37: f"{CONFIG} test_rejects_wrong_integer",
    38: f"{CONFIG} test_rejects",
    39: f"{CONFIG} test_rejects",
    40: f"{CONFIG} test_rejects",
    41: f"{HERE} test_config_values_out_of_range",
    42: f"{HERE} test_config_values_out_of_range",
    43: f"{HERE} test_code_beside_a_target_is_never_run_and_said_once",
    44: f"{FP8_FORMATS} test_rejects_config",
    45: f"{HERE} test_files_of_json_without_end",
    46: f"{DRAFTS} test_rejects_missing_tensor",
    47: f"{DRAFTS} test_rejects_missing_tensor",
    48: f"{MAPS} test_rejects_map",
    49: f"{MAPS} test_rejects_membership_that_disagrees",
    50: f"{MAPS} test_map_of_another_integer_type",
    51: f"{DRAFTS} test_rejects_config_that_does_not_fit",
    52: f"{DRAFTS} test_rejects_taps_outside_the_target",
    53: f"{DRAFTS} test_collapsed_default_taps_name_the_key_to_set",
    54: "eagle3/test_registry.py test_unknown_names_list_the_known_ones",
    55: "test_cli.py test_a_dead_draft_is_said_once_on_stderr",
    56: f"{HERE} test_numbers_of_drafted_tokens",
    57: "test_policies.py test_rejects_bad_policies",
    58: f"{STORED} test_rejects_folder_of_pickles",
    59: f"{HERE} test_code_beside_a_target_is_never_run_and_said_once",
    60: f"{HERE} test_chat_templates_are_not_rendered",
    62: f"{LOSSLESS} test_rejects_bad_requests",
    63: f"{HERE} test_prompts_of_another_shape",
    64: f"{LOSSLESS} test_rejects_bad_requests",
    65: f"{SAMPLED} test_tiny_temperature_is_greedy",
    66: f"{SAMPLED} test_rejects_bad_settings",
    67: "test_batches.py test_as_alone",
    70: f"{SAMPLED} test_illegal_logits_raise",
    72: f"{HERE} test_an_exception_in_mid_run_leaves_the_model_usable",
    73: f"{HERE} test_two_threads_on_one_pair",
    74: f"{HERE} test_models_are_loaded_for_inference",
    75: "kernels/test_backend.py test_triton_on_a_cpu_needs_the_interpreter",
    76: "kernels/test_experts.py test_histograms",
    77: "kernels/test_embedding.py test_id_outside_the_table_gives_nan",
    78: "kernels/test_rms_norm.py test_any_shape_and_layout",
    79: "kernels/test_attention_temperature.py test_steps_at_multiples_of_the_floor_scale",
    80: "kernels/test_linear.py test_fp8_needs_a_gpu_that_has_it",
}
NOTHING_TO_TEST = {
    61: "no tuning cache of our own; Triton's is in SECURITY.md",
    68: "no caches are passed in",
    69: "no masks are passed in",
    71: "no padding",
}


def test_every_row_has_a_place():
    assert ROWS.keys() | NOTHING_TO_TEST.keys() == set(range(1, 81))
    assert not ROWS.keys() & NOTHING_TO_TEST.keys()


@pytest.mark.parametrize("row", ROWS)
def test_its_test_exists(row):
    file, name = ROWS[row].split()
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# A: the container


def test_header_that_is_no_text(tmp_path):
    header = b'{"a\xff": 1}'
    write(tmp_path, {"a": torch.ones(1)})
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{FILE}: not a readable safetensors file (header: " in rejection(tmp_path)


@pytest.mark.parametrize("end", [32, 2**40, 2**62])
def test_offsets_past_the_end(end, tmp_path):
    write(tmp_path, {"a": torch.ones(1)})
    past = {"dtype": "I8", "shape": [end - 24], "data_offsets": [24, end]}
    write_header(tmp_path, {"a": A, "b": past}, data=28)
    message = rejection(tmp_path)
    assert f"its tensors end at byte {os.path.getsize(tmp_path / FILE) + end - 28}" in message


def test_tensor_without_elements(tmp_path):
    tensors = random_tensors()
    tensors[UP] = torch.empty(0, 16)
    assert f"{UP}: shape (0, 16), expected (20, 16)" in rejection(write(tmp_path, tensors))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\x00b", "", " ", "model..norm"])
def test_tensor_names_are_no_paths(name, tmp_path):
    write(tmp_path, {"a": torch.ones(1)})
    write_header(tmp_path, {name: A, "b": B})
    assert f"{name}: unexpected" in rejection(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", FILE]


# B: index and shards


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_files_of_json_without_end(name, tmp_path):
    """A sparse file of a gigabyte is refused without reading it."""
    folder = write_shards(tmp_path, random_tensors())
    with (folder / name).open("ab") as stream:
        stream.truncate(10**9)
    assert f"{name}: larger than 16777216 bytes" in rejection(folder)


def test_index_of_very_many_tensors(tmp_path):
    """Of two hundred thousand a thousand are named, in seconds."""
    folder = write_shards(tmp_path, random_tensors())
    (folder / "model-0.safetensors").rename(folder / "a.safetensors")
    weight_map = {f"{i:x}": "a.safetensors" for i in range(200_000)}
    start = time.perf_counter()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}, separators=(",", ":")))
    assert len(rejection(folder).splitlines()) == 1000
    assert time.perf_counter() - start < 20


CHANGED = ("MODEL-0.safetensors", "model-0.SAFETENSORS")
NAMES = (*CHANGED, "model-0.safetensors.", "model-0.safetensors ", "model-0.safetensors\n")


@pytest.mark.parametrize("name", NAMES)
def test_shard_names_that_are_other_names_elsewhere(name, tmp_path):
    message = rejection(write_shards(tmp_path, random_tensors(), **{UP: name}))
    assert name in message or repr(name) in message
    assert "safetensors file" in message


# C: target tensors


@pytest.mark.parametrize("form", ["fused", "one by one"])
def test_one_layer_without_experts(form, tmp_path):
    tensors = random_tensors()
    tensors = one_by_one(tensors) if form == "one by one" else tensors
    lost = [name for name in tensors if ".experts." in name and "down" not in name]
    for name in lost:
        del tensors[name]
    message = rejection(write(tmp_path, tensors))
    assert all(f"{name}: missing" in message for name in lost)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_experts_of_bytes_without_a_quantisation(dtype, tmp_path):
    tensors = random_tensors()
    tensors[EXPERTS] = tensors[EXPERTS].to(dtype)
    assert f"{EXPERTS}: {dtype}, expected float16" in rejection(write(tmp_path, tensors))


def test_mixed_types_are_cast_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "aerie")
    tensors = random_tensors()
    tensors[UP] = tensors[UP].bfloat16()
    tensors[EXPERTS] = tensors[EXPERTS].half()
    loaded = load(write(tmp_path, tensors))
    assert torch.equal(loaded[UP], tensors[UP].float())
    assert "tensors cast to torch.float32: 1 of BF16, 1 of F16" in caplog.text


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-40])
def test_matrices_of_nothing_are_said(value, tmp_path, caplog):
    tensors = random_tensors()
    load(write(tmp_path, tensors))
    assert caplog.text == ""
    tensors[EXPERTS].fill_(value)
    tensors["model.norm.weight"].fill_(value)  # a vector may be
    load(write(tmp_path, tensors))
    assert f"all values are zero or denormal in 1 matrices ({EXPERTS})" in caplog.text
    tensors[EXPERTS][0, 0, 0] = 1.0
    caplog.clear()
    load(write(tmp_path, tensors))
    assert caplog.text == ""


# D: config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("floor_scale", value) for value in (0, -1, float("nan"), "8192")),
        *(("attn_scale", value) for value in (float("nan"), float("inf"), 0, None, [])),
        *(("hidden_act", value) for value in ("system", "gelu", "", ["silu"], {"x": 1})),
    ],
    ids=str,
)
def test_config_values_out_of_range(key, value):
    values = {**VALUES, "attn_temperature_tuning": True, key: value}
    if value is None:  # means that it is absent
        assert Llama4Config.from_hf(values).temperature is not None
        return
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        Llama4Config.from_hf(values)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "num_local_experts", "vocab_size", "hidden_size", "head_dim"]
)
def test_claims_of_a_target_cost_nothing(key, tmp_path):
    """`inspect` and `plan` build a model without values from what the config says."""
    values = {**VALUES, key: 2**31 - 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    start = time.perf_counter()
    for command in (["inspect", str(tmp_path)], ["plan", "--model", str(tmp_path)]):
        refused = CliRunner().invoke(app, command).exit_code == 2
        assert refused or key == "hidden_size"  # which only makes shapes
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "key", ["vocab_size", "draft_vocab_size", "num_aux_layers", "num_aux_hidden_states"]
)
def test_claims_of_a_draft_cost_nothing(key, tmp_path):
    config = json.loads((DRAFT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"fc_norm": True, key: 2**31 - 1}))
    start = time.perf_counter()
    result = CliRunner().invoke(app, ["plan", "--model", str(TARGET), "--draft", str(tmp_path)])
    assert result.exit_code == 2
    assert f"'{key}': must be at most" in result.stderr
    assert time.perf_counter() - start < 20


# E: drafts


@pytest.mark.parametrize("number", [0, -1, 10**6, "3", 3.0, True, None], ids=repr)
def test_numbers_of_drafted_tokens(number):
    target = Llama4ForCausalLM.from_pretrained(TARGET)
    with pytest.raises(ValueError, match="num_speculative_tokens: must be an integer"):
        generate(target, [1], 4, num_speculative_tokens=number)


# F: code execution and files


def test_code_beside_a_target_is_never_run_and_said_once(tmp_path, caplog):
    folder = write(tmp_path, random_tensors(), {**VALUES, "auto_map": {"AutoModel": "evil.Model"}})
    for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for _ in range(3):
        load(folder)
    assert not (tmp_path / "ran").exists()
    assert caplog.text.count("auto_map is ignored: nothing in a checkpoint is ever imported") == 1


def test_chat_templates_are_not_rendered(tmp_path):
    """A loop without end, were it rendered."""
    folder = write(tmp_path, random_tensors())
    template = "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    load(folder)
    for file in (ROOT / "src/aerie").rglob("*.py"):
        assert "jinja2" not in imported_modules(file), file


# G: requests


@pytest.fixture(scope="module")
def target() -> Llama4ForCausalLM:
    return Llama4ForCausalLM.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def draft(target) -> Eagle3Llama4ForCausalLM:
    return Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, target)


@pytest.mark.parametrize("prompt", [[[[1]]], [1.5], ["a"], [None], [1, [2]]], ids=str)
def test_prompts_of_another_shape(prompt, target):
    with pytest.raises(ValueError, match=r"prompt_ids: must lie in 0\.\."):
        generate(target, prompt, 4)


def test_one_prompt_with_the_shape_of_a_batch(target):
    with pytest.raises(ValueError, match=r"prompt_ids: must lie in 0\.\."):
        Decoding(target, torch.tensor([[1, 2]]), 4)


def test_an_exception_in_mid_run_leaves_the_model_usable(target, draft):
    expected = generate(target, [1, 2, 3], 20, draft).tokens
    calls = 0

    def spoil(prefix_ids, logits):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyError("mine")
        return logits

    with pytest.raises(KeyError, match="mine"):
        generate(target, [1, 2, 3], 20, draft, sampling=SamplingParams(logits_processors=[spoil]))
    decoding = Decoding(target, [1, 2, 3], 20, draft)
    bursts = iter(decoding)
    tokens = [*next(bursts), *next(bursts)]
    del bursts  # its reader goes away
    assert tokens == expected[: len(tokens)]
    assert generate(target, [1, 2, 3], 20, draft).tokens == expected


def test_two_threads_on_one_pair(target, draft):
    prompts = [[1, 2, 3], [9, 8, 7, 6], [5], [300, 4]]
    expected = [generate(target, prompt, 24, draft).tokens for prompt in prompts]
    found: dict[int, list[int]] = {}

    def run(index: int) -> None:
        found[index] = generate(target, prompts[index], 24, draft).tokens

    threads = [Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(prompts))] == expected


def test_models_are_loaded_for_inference(target, draft):
    for model in (target, draft):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
