"""`aerie inspect`: both kinds of checkpoint, both names of every tap, and every problem at once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aerie.cli import app
from aerie.embedded import DRAFT, TARGET

TAP_KEY = "eagle_aux_hidden_state_layer_ids"


def aerie_inspect(*arguments: object):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def printed(*arguments: object) -> dict:
    return json.loads(aerie_inspect(*arguments, "--json").stdout)


@pytest.fixture
def broken(tmp_path):
    """`broken(source, config_changes, tensor_change)`: an edited copy of a checkpoint."""

    def edit(source, changes: dict, change=lambda tensors: None):
        folder = shutil.copytree(source, tmp_path / source.name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return edit


def test_draft():
    found = printed(DRAFT, "--target", TARGET, "--context", 100, "--batch", 3)
    assert (found["kind"], found["problems"]) == ("draft", [])
    assert found["facts"]["architecture"] == "LlamaForCausalLMEagle3"
    assert found["facts"]["vocabulary map"] == "768 of 1024 target ids (75.0%), 1 to 1023"
    decisions = {topic: d["choice"] for topic, d in found["decisions"].items()}
    assert decisions["taps"] == "inputs to layers 2, 6, 9 = outputs of layers 1, 5, 8"
    assert decisions["layer kind"] == "llama"
    assert decisions["embedding"] == "the target's"
    assert found["decisions"]["layer kind"]["reason"] == "model_type 'llama'"
    stored = load_file(DRAFT / "model.safetensors")
    assert found["num_values"] == sum(tensor.numel() for tensor in stored.values())
    assert found["weight_bytes"] == sum(t.numel() * t.itemsize for t in stored.values())
    asked = ("--draft", DRAFT, "--model", TARGET, "--context", 100, "--batch", 3, "--json")
    planned = json.loads(CliRunner().invoke(app, ["plan", *map(str, asked)]).stdout)
    ours = {"activations", "memory", "total"}
    assert {k: v for k, v in found["memory"].items() if k not in ours} == {
        k: v for k, v in planned.items() if k not in ours
    }


def test_target():
    found = printed(TARGET)
    assert (found["kind"], found["problems"]) == ("target", [])
    assert found["tensors"]["routed experts"]["values"] == {"BF16": 1179648}
    stored = load_file(TARGET / "model.safetensors")
    assert found["num_values"] == sum(tensor.numel() for tensor in stored.values())


def test_table():
    result = aerie_inspect(DRAFT, "--target", TARGET)
    assert result.exit_code == 0
    assert "outputs of layers 1, 5, 8" in result.stdout
    assert "none found" in result.stdout


def test_without_a_target_the_usual_depth_is_assumed_and_said():
    found = printed(DRAFT)
    assert "48 layers assumed" in found["facts"]["target"]
    assert "inputs to layers 2, 24, 45" in found["decisions"]["taps"]["choice"]
    # 128 pages of 64: keys and values of 2 heads of 32 in 2 bytes, their numbers, a slot each
    num_bytes = 8192 * (2 * 2 * 32 * 2 + 8) + 512
    assert found["facts"]["KV cache"].startswith(f"{num_bytes / 2**20:.2f} MiB")
    assert found["memory"] is None


def test_every_problem_of_a_draft(broken):
    def change(tensors) -> None:
        del tensors["fc.weight"]
        tensors["extra"] = torch.zeros(2)
        tensors["norm.weight"][3] = torch.inf
        tensors["d2t"] *= 0

    changes = {TAP_KEY: [1, 5, 40], "max_position_embeddings": 64}
    folder = broken(DRAFT, changes, change)
    result = aerie_inspect(folder, "--target", TARGET)
    assert result.exit_code == 2
    for problem in (
        "fc.weight: missing",
        "extra: unexpected",
        "norm.weight: not finite",
        "d2t",
        "(2, 6, 41)",
    ):
        assert problem in " ".join(result.stdout.split()), problem


def test_every_wrong_key_of_a_draft(broken):
    folder = broken(DRAFT, {"hidden_act": "gelu", "rms_norm_eps": "x", "num_hidden_layers": 2})
    problems = printed(folder, "--target", TARGET)["problems"]
    for key in ("hidden_act", "rms_norm_eps", "num_hidden_layers"):
        assert any(key in problem for problem in problems)


def test_a_head_that_no_tensor_gives_is_a_problem(broken):
    def change(tensors) -> None:
        del tensors["lm_head.weight"]

    folder = broken(DRAFT, {"tie_word_embeddings": True, "draft_vocab_size": 1024}, change)
    assert any("'tie_word_embeddings': true" in problem for problem in printed(folder)["problems"])


def test_every_problem_of_a_target(broken):
    def change(tensors) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(2)
        tensors["lm_head.weight"][0, 0] = torch.nan

    problems = "\n".join(printed(broken(TARGET, {}, change))["problems"])
    for problem in ("model.norm.weight: missing", "model.extra: unexpected", "not finite"):
        assert problem in problems


def test_another_targets_draft(broken):
    folder = broken(TARGET, {"hidden_size": 256, "vocab_size": 1000})
    problems = "\n".join(printed(DRAFT, "--target", folder)["problems"])
    assert "target_hidden_size 128 is not the target's 256" in problems
    assert "vocab_size 1024 is not the target's 1000" in problems


def test_files_that_are_no_checkpoint(tmp_path):
    problems = printed(tmp_path)["problems"]
    assert any("config.json: no such file" in problem for problem in problems)
    assert any("model.safetensors" in problem for problem in problems)
    assert aerie_inspect(tmp_path / "absent").exit_code == 2
    assert aerie_inspect(DRAFT, "--batch", 0).exit_code == 2


def test_code_in_a_checkpoint_is_data(broken, tmp_path):
    """`auto_map` and modelling files are what remote code looks like: never imported."""
    folder = broken(DRAFT, {"auto_map": {"AutoModel": "evil.Model"}})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    found = printed(folder, "--target", TARGET)
    assert "present and ignored" in found["facts"]["auto_map"]
    assert found["problems"] == []
    assert not (tmp_path / "ran").exists()


def test_every_wrong_key_of_a_target(broken):
    changes = {"hidden_size": 0, "rms_norm_eps": "x", "moe_layers": [99], "floor_scale": -1}
    problems = printed(broken(TARGET, changes))["problems"]
    for key in changes:
        assert any(f"'{key}'" in problem for problem in problems), key
