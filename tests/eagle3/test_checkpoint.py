"""Loading a raw draft strictly: names that are read, and every way a draft dies silently, refused.

A draft that loads wrongly stays lossless and accepts nothing, so each rejection is an error whose
message names the tensor or key. Regimes: tensor names, MoE drafts, widths, taps, spoilt tensors.
Vocabulary maps have a file of their own.
"""

import pytest
import torch

from aerie.llama4.json_fields import CheckpointError

TAP_KEY = "eagle_aux_hidden_state_layer_ids"


def rejection(load_draft, files, target=None) -> str:
    with pytest.raises(CheckpointError) as error:
        load_draft(files, target)
    return str(error.value)


@pytest.mark.parametrize("old_new", [("midlayer.", "layers.0."), ("", "model.")], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_other_tensor_names(kind, old_new, draft_files, load_draft):
    files = draft_files(kind)
    expected = load_draft(files).state_dict()
    old, new = old_new
    files.tensors = {
        (new + name.removeprefix(old) if name.startswith(old) and name != "d2t" else name): tensor
        for name, tensor in files.tensors.items()
    }
    actual = load_draft(files).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0."])
def test_feed_forward_names(prefix, draft_files, load_draft):
    files = draft_files("llama4")
    files.tensors = {
        name.replace("midlayer.mlp.", f"{prefix}feed_forward."): tensor
        for name, tensor in files.tensors.items()
    }
    load_draft(files)


@pytest.mark.parametrize("prefix", ["model.midlayer.", "model.layers.0."])
def test_prefixed_feed_forward_names(prefix, draft_files, load_draft):
    files = draft_files("llama4")
    files.tensors = {
        name.replace("midlayer.mlp.", f"{prefix}feed_forward."): tensor
        for name, tensor in files.tensors.items()
    }
    load_draft(files)


def test_rejects_two_names_of_one_tensor(draft_files, load_draft):
    files = draft_files("llama")
    files.tensors["layers.0.hidden_norm.weight"] = torch.ones(40)
    message = rejection(load_draft, files)
    assert "tensor midlayer.hidden_norm.weight appears twice" in message


@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_dense_draft_may_list_a_moe_layer(kind, draft_files, load_draft):
    load_draft(draft_files(kind, moe_layers=[0]))


@pytest.mark.parametrize("prefix", ["midlayer.", "model.layers.0."])
@pytest.mark.parametrize("changes", [{}, {"moe_layers": [0]}], ids=str)
def test_rejects_moe_draft(changes, prefix, draft_files, load_draft):
    files = draft_files("llama4", **changes)
    names = ("router.weight", "experts.gate_up_proj", "experts.down_proj")
    for name in names:
        files.tensors[f"{prefix}feed_forward.{name}"] = torch.zeros(2, 40)
    for part in ("gate", "up", "down"):
        weight = files.tensors.pop(f"midlayer.mlp.{part}_proj.weight")
        files.tensors[f"{prefix}feed_forward.shared_expert.{part}_proj.weight"] = weight
    message = rejection(load_draft, files)
    assert all(f"midlayer.mlp.{name}: unexpected" in message for name in names)
    assert "midlayer.mlp.gate_proj.weight: missing" in message


def test_weights_take_the_targets_dtype_and_embedding(draft_files, load_draft, make_target):
    files, target = draft_files("llama"), make_target()
    files.tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in files.tensors.items()
    }
    draft = load_draft(files, target)
    assert {p.dtype for p in draft.parameters()} == {torch.float32}
    assert draft.embed_tokens is target.model.embed_tokens
    assert not any("embed" in name for name in draft.state_dict())


@pytest.mark.parametrize(
    "name", ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "midlayer.hidden_norm.weight"]
)
def test_rejects_missing_tensor(name, draft_files, load_draft):
    files = draft_files("llama")
    del files.tensors[name]
    assert f"{name}: missing" in rejection(load_draft, files)


@pytest.mark.parametrize(
    "name", ["fc.bias", "mask_hidden", "fc_norm.0.weight", "layers.1.mlp.up_proj.weight"]
)
def test_rejects_unexpected_tensor(name, draft_files, load_draft):
    files = draft_files("llama")
    files.tensors[name] = torch.zeros(3)
    assert f"{name}: unexpected" in rejection(load_draft, files)


def test_lists_all_that_is_wrong(draft_files, load_draft):
    files = draft_files("llama4")
    del files.tensors["norm.weight"]
    files.tensors["extra"] = torch.zeros(3)
    files.tensors["fc.weight"] = files.tensors["fc.weight"][:, :80].contiguous()
    files.tensors["lm_head.weight"][1, 2] = torch.nan
    message = rejection(load_draft, files)
    assert "4 tensors are wrong" in message
    for part in (
        "norm.weight: missing",
        "extra: unexpected",
        "fc.weight: shape (40, 80), expected (40, 120)",
        "lm_head.weight: not finite",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 95}, ["vocab_size 95", "96"]),
        ({"hidden_size": 48}, ["hidden_size", "48", "40"]),
        ({"target_hidden_size": 48}, ["target_hidden_size", "48", "40"]),
        ({"num_aux_layers": 2}, ["fc reads 2", "(2, 4, 5)"]),
        ({"num_hidden_layers": 2}, ["num_hidden_layers"]),
        ({"architectures": ["MedusaModel"]}, ["MedusaModel"]),
    ],
    ids=["vocabulary", "width", "target width", "tap count", "two layers", "architecture"],
)
def test_rejects_config_that_does_not_fit(changes, expected, draft_files, load_draft):
    files = draft_files("llama")
    files.config |= changes
    if "num_aux_layers" in changes:
        files.tensors["fc.weight"] = files.tensors["fc.weight"][:, :80].contiguous()
    message = rejection(load_draft, files)
    assert all(part in message for part in expected)


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [([1, 3, 9], "(2, 4, 10)"), ([-2, 4, 5], "(-1, 5, 6)"), ([1, 1, 4], "(2, 2, 5)")],
    ids=str,
)
def test_rejects_taps_outside_the_target(outputs, inputs, draft_files, load_draft):
    message = rejection(load_draft, draft_files("llama", **{TAP_KEY: outputs}))
    assert "distinct and within 0..8 (inputs of the target's layers)" in message
    assert f"'{TAP_KEY}': {inputs}, from the draft's config" in message


@pytest.mark.parametrize(("depth", "taps"), [(4, "(2, 2, 1)"), (6, "(2, 3, 3)")], ids=str)
def test_rejects_default_taps_that_collapse(depth, taps, draft_files, load_draft, make_target):
    with pytest.raises(ValueError, match=r"must be distinct") as error:
        load_draft(draft_files("llama"), make_target(num_hidden_layers=depth))
    assert taps in str(error.value)


def test_shallow_target_with_explicit_taps(draft_files, load_draft, make_target):
    load_draft(draft_files("llama", **{TAP_KEY: [0, 1, 2]}), make_target(num_hidden_layers=3))


def test_collapsed_default_taps_name_the_key_to_set(draft_files, load_draft, make_target):
    message = rejection(load_draft, draft_files("llama"), make_target(num_hidden_layers=6))
    assert TAP_KEY in message
    assert "default" in message
