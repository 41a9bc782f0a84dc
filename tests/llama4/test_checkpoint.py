"""Loading a target strictly from safetensors: one file, shards, multimodal; all faults listed.

A rejection is a CheckpointError that names the file and the tensor. Regimes: absent and spoilt
files, a stray or false index, missing, extra, misshapen and non-finite tensors.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aerie.llama4.config import Llama4Config
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM

VALUES: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 12,
    "intermediate_size_mlp": 20,
    "num_hidden_layers": 2,
    "interleave_moe_layer_step": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 3,
    "max_position_embeddings": 64,
}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
UP = "model.layers.0.feed_forward.up_proj.weight"
EXPERTS = "model.layers.1.feed_forward.experts.down_proj"


def random_tensors(**changes) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4Config.from_hf({**VALUES, **changes}))
    return {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}


def write(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any] = VALUES) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / FILE)
    return folder


def write_shards(folder: Path, *shards: dict[str, Tensor], **listed: str) -> Path:
    """`listed` are entries of the index besides (or in place of) the shards' own tensors."""
    (folder / "config.json").write_text(json.dumps(VALUES))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number}.safetensors"
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | listed}))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return Llama4ForCausalLM.from_pretrained(folder, dtype).state_dict()


def rejection(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(CheckpointError) as error:
        load(folder, dtype)
    assert str(folder) in str(error.value)
    return str(error.value)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_one_file(backend, tmp_path):
    """Each backend has its own layout in memory; some tensors are turned while they are read."""
    tensors = random_tensors()
    folder = write(tmp_path, tensors)
    assert_same(Llama4ForCausalLM.from_pretrained(folder, backend=backend).state_dict(), tensors)


def test_loads_within_inference_mode(tmp_path):
    tensors = random_tensors()
    folder = write(tmp_path, tensors)
    with torch.inference_mode():
        loaded = load(folder)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_shards(tmp_path):
    tensors = random_tensors()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[start::3]} for start in range(3)]
    assert_same(load(write_shards(tmp_path, *parts)), tensors)


def test_text_part_of_a_multimodal_checkpoint(tmp_path):
    tensors = random_tensors()
    files = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    files["vision_model.patch_embedding.linear.weight"] = torch.randn(4, 4)
    files["multi_modal_projector.linear_1.weight"] = torch.randn(16, 4)
    values = {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": VALUES,
        "vision_config": {"hidden_size": 4},
    }
    assert_same(load(write(tmp_path, files, values)), tensors)


def test_tied_head_is_one_tensor(tmp_path):
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    folder = write(tmp_path, tensors, {**VALUES, "tie_word_embeddings": True})
    model = Llama4ForCausalLM.from_pretrained(folder)
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert head.data_ptr() == embedding.data_ptr()
    assert torch.equal(head, tensors["model.embed_tokens.weight"])


def test_weights_are_cast_and_frozen(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in random_tensors().items()}
    model = Llama4ForCausalLM.from_pretrained(write(tmp_path, tensors), dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("path", ["no folder here", "a/b/c", "/nowhere/at/all", "../x", ""])
def test_rejects_path_that_is_no_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        resolve_folder(path or tmp_path / "absent")
    assert (path or "absent") in str(error.value)


def test_rejects_file_in_place_of_its_folder(tmp_path):
    (tmp_path / FILE).touch()
    with pytest.raises(CheckpointError, match=f"{FILE}: is a file; give the folder that holds"):
        resolve_folder(tmp_path / FILE)


def test_rejects_end_tokens_of_another_vocabulary(tmp_path):
    folder = write(tmp_path, random_tensors(), {**VALUES, "eos_token_id": 2})
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 24]}')
    with pytest.raises(CheckpointError, match=r"eos_token_id: \[24\] outside the vocabulary 0..23"):
        load(folder)


def test_rejects_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    message = rejection(tmp_path)
    assert FILE in message
    assert INDEX in message


@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_rejects_truncated_file(keep, tmp_path):
    file = write(tmp_path, random_tensors()) / FILE
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file}: not a readable safetensors file" in rejection(tmp_path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"PK\x03\x04" * 100, "it is a pickle; loading a pickle runs code"),
        (LFS_POINTER, "it is a Git-LFS pointer, run git lfs pull"),
        (b"", "empty; fetch the file again"),
    ],
    ids=["zip", "Git-LFS", "empty"],
)
def test_rejects_file_of_another_format(content, hint, tmp_path):
    file = write(tmp_path, random_tensors()) / FILE
    file.write_bytes(content)
    assert f"{file}: not a readable safetensors file ({hint}" in rejection(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/tmp/x.safetensors", "a/x.safetensors", "weights.bin", "..", ""]
)
def test_rejects_index_that_points_elsewhere(name, tmp_path):
    folder = write_shards(tmp_path, random_tensors(), **{UP: name})
    assert f"{name!r} is not a plain safetensors file name" in rejection(folder)


@pytest.mark.parametrize("value", [{}, {"weight_map": {}}, {"weight_map": [FILE]}], ids=str)
def test_rejects_index_without_map(value, tmp_path):
    folder = write_shards(tmp_path, random_tensors())
    (folder / INDEX).write_text(json.dumps(value))
    assert "'weight_map' must be a non-empty object" in rejection(folder)


def test_rejects_missing_shard(tmp_path):
    folder = write_shards(tmp_path, random_tensors())
    (folder / "model-0.safetensors").unlink()
    assert "model-0.safetensors: a safetensors file that the index lists is missing" in rejection(
        folder
    )


def test_rejects_tensor_in_two_shards(tmp_path):
    tensors = random_tensors()
    folder = write_shards(tmp_path, tensors, {UP: tensors[UP]})
    assert f"{UP}: in model-0.safetensors and in model-1.safetensors" in rejection(folder)


def test_rejects_index_that_names_the_wrong_shard(tmp_path):
    tensors = random_tensors()
    second = {UP: tensors.pop(UP), EXPERTS: tensors.pop(EXPERTS)}
    folder = write_shards(tmp_path, tensors, second, **{UP: "model-0.safetensors"})
    listed = "listed in model-0.safetensors, held by model-1.safetensors"
    assert f"the index and the shard disagree about '{UP}': {listed}" in rejection(folder)


def test_rejects_index_that_names_a_tensor_no_shard_holds(tmp_path):
    folder = write_shards(tmp_path, random_tensors(), ghost="model-0.safetensors")
    assert "the index and the shard disagree about 'ghost'" in rejection(folder)


def test_lists_all_that_is_wrong(tmp_path):
    tensors = random_tensors()
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(2, 2)
    tensors[EXPERTS] = tensors[EXPERTS].transpose(1, 2).contiguous()
    tensors[UP][3, 1] = torch.nan
    message = rejection(write(tmp_path, tensors))
    assert "5 tensors are wrong" in message
    for part in (
        "model.norm.weight: missing",
        "lm_head.weight: missing",
        "model.layers.2.self_attn.q_proj.weight: unexpected",
        f"{EXPERTS}: shape (3, 16, 12), expected (3, 12, 16) [{FILE}]; it looks transposed",
        f"{UP}: not finite in torch.float32: 1 of 320 values",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(v, torch.float32) for v in (torch.nan, torch.inf, -torch.inf)] + [(1e6, torch.float16)],
    ids=str,
)
def test_rejects_weight_that_is_not_finite_in_the_asked_dtype(value, dtype, tmp_path):
    tensors = random_tensors()
    tensors[EXPERTS][2, 1, 0] = value
    assert f"{EXPERTS}: not finite in {dtype}" in rejection(write(tmp_path, tensors), dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool])
def test_rejects_weight_that_is_no_float(dtype, tmp_path):
    tensors = random_tensors()
    tensors["model.norm.weight"] = torch.ones(16).to(dtype)
    assert f"model.norm.weight: {dtype}" in rejection(write(tmp_path, tensors))


def one_by_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same experts as per-expert files have them: alone and output-major."""
    prefix = "model.layers.1.feed_forward.experts."
    gate_up, down = tensors.pop(f"{prefix}gate_up_proj").mT, tensors.pop(f"{prefix}down_proj").mT
    for e in range(len(down)):
        gate, up = gate_up[e].chunk(2)
        for name, weight in (("gate", gate), ("up", up), ("down", down[e])):
            tensors[f"{prefix}{e}.{name}_proj.weight"] = weight.contiguous()
    return tensors


def test_experts_one_by_one(tmp_path):
    tensors = random_tensors()
    assert_same(load(write(tmp_path, one_by_one(dict(tensors)))), tensors)


def test_rejects_experts_that_are_partly_fused(tmp_path):
    fused = random_tensors()
    tensors = one_by_one(dict(fused)) | {EXPERTS: fused[EXPERTS]}
    del tensors[EXPERTS.replace("down_proj", "2.down_proj.weight")]
    message = rejection(write(tmp_path, tensors))
    assert f"{EXPERTS}: unexpected" in message
    assert "experts.2.down_proj.weight: missing" in message


def test_rejects_more_experts_than_the_config_has(tmp_path):
    folder = write(tmp_path, one_by_one(random_tensors()), {**VALUES, "num_local_experts": 2})
    assert "experts.2.down_proj.weight: unexpected" in rejection(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"], ids=str)
def test_rejects_dtype_that_does_not_hold_weights(dtype, tmp_path):
    with pytest.raises(ValueError, match="dtype: must be torch.float32, .* got "):
        load(write(tmp_path, random_tensors()), dtype)
