"""Loading a raw draft strictly: names that are read, and every way a draft dies silently, refused.

A draft that loads wrongly stays lossless and accepts nothing, so each rejection is an error whose
message names the tensor or key. Regimes: tensor names, maps, widths, taps, spoilt tensors.
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
    files.tensors["model.t2d"] = torch.zeros(96, dtype=torch.bool)
    load_draft(files)


def test_map_of_another_integer_type(draft_files, load_draft):
    files = draft_files("llama")
    files.tensors["d2t"] = files.tensors["d2t"].int()
    assert load_draft(files).d2t.dtype == torch.int64  # what the draft head's kernel reads


def test_t2d_is_tolerated(draft_files, load_draft):
    files = draft_files("llama")
    files.tensors["t2d"] = torch.zeros(96, dtype=torch.bool)
    draft = load_draft(files)
    assert torch.equal(draft.d2t, files.tensors["d2t"])
    assert draft.d2t.dtype == torch.int64


def test_zero_offsets_mean_the_full_vocabulary(draft_files, load_draft):
    files = draft_files("llama", draft_vocab_size=96)
    files.tensors["d2t"] = torch.zeros(96, dtype=torch.int64)
    assert not load_draft(files).d2t.any()


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


IDS = torch.arange(32) * 3  # the kept target ids; their offsets are 2 j
MAPS = {
    "all zero": (IDS * 0, "d2t is all zero"),
    "target ids": (IDS, "not target ids"),
    "below the vocabulary": (IDS - torch.arange(32) - 1, "within 0..95"),
    "above the vocabulary": (IDS - torch.arange(32) + 3, "within 0..95"),
    "falling": (-2 * torch.arange(32) + 90, "rise strictly"),
    "one id twice": (torch.tensor([0] * 31 + [-1]), "rise strictly"),
    "floats": ((IDS * 0).float(), "d2t: torch.float32, expected int32 or int64"),
    "too short": (IDS[:31] * 0, "d2t: shape (31,), expected (32,)"),
}


@pytest.mark.parametrize("case", MAPS)
def test_rejects_map(case, draft_files, load_draft):
    files = draft_files("llama")
    files.tensors["d2t"], expected = MAPS[case]
    assert expected in rejection(load_draft, files)


@pytest.mark.parametrize("first", [0, 2**63 - 1])
def test_rejects_map_whose_sums_wrap(first, draft_files, load_draft):
    """The wrapped sums rise and end below the vocabulary's size: the ends alone tell nothing."""
    files = draft_files("llama")
    files.tensors["d2t"] = torch.tensor([first] * 31 + [2**63 - 10 if first == 0 else first])
    assert "within 0..95" in rejection(load_draft, files)


def test_rejects_arange_in_place_of_zeros(draft_files, load_draft):
    files = draft_files("llama", draft_vocab_size=96)
    files.tensors["d2t"] = torch.arange(96)
    assert "offsets" in rejection(load_draft, files)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 95}, ["vocab_size 95", "96"]),
        ({"hidden_size": 48}, ["hidden_size", "48", "40"]),
        ({"target_hidden_size": 48}, ["target_hidden_size", "48", "40"]),
        ({"num_aux_layers": 2}, ["2", "(2, 4, 5)"]),
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


@pytest.mark.parametrize("taps", [[2, 4, 9], [-1, 4, 5], [2, 2, 5]], ids=str)
def test_rejects_taps_outside_the_target(taps, draft_files, load_draft):
    files = draft_files("llama", **{TAP_KEY: taps})
    with pytest.raises(ValueError, match=r"distinct and within 0\.\.8") as error:
        load_draft(files)
    assert str(tuple(taps)) in str(error.value)


@pytest.mark.parametrize(("depth", "taps"), [(4, "(2, 2, 1)"), (6, "(2, 3, 3)")], ids=str)
def test_rejects_default_taps_that_collapse(depth, taps, draft_files, load_draft, make_target):
    with pytest.raises(ValueError, match=r"must be distinct") as error:
        load_draft(draft_files("llama"), make_target(num_hidden_layers=depth))
    assert taps in str(error.value)


def test_shallow_target_with_explicit_taps(draft_files, load_draft, make_target):
    load_draft(draft_files("llama", **{TAP_KEY: [0, 1, 2]}), make_target(num_hidden_layers=2))


def test_collapsed_default_taps_name_the_key_to_set(draft_files, load_draft, make_target):
    message = rejection(load_draft, draft_files("llama"), make_target(num_hidden_layers=6))
    assert TAP_KEY in message
    assert "default" in message
