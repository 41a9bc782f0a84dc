"""Every published draft format: written from a random tiny draft, loaded, compared bit for bit.

Logits come from the oracle, which reads the raw layout alone. Regimes: tensor names, nested configs
and their flag defaults, embeddings and heads that are the draft's own, shared, or cut out of the
target's; overrides of what a file says.
"""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aerie.eagle3.reading import Reading
from aerie.eagle3.registry import load_draft
from aerie.llama4.json_fields import CheckpointError

TAP_KEY = "eagle_aux_hidden_state_layer_ids"
ROWS = 7
NESTED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def as_speculators(files, architecture: str = "Eagle3DraftModel", **changes):
    """The library's layout: nested layer config, `layers.0.`, and more keys than we need."""
    top = ("draft_vocab_size", "target_hidden_size", "norm_before_fc", "fc_norm", "norm_output")
    layer = {k: v for k, v in files.config.items() if k not in (*top, "architectures")}
    files.config = {
        "architectures": [architecture],
        "auto_map": {"": "config.Eagle3SpeculatorConfig"},
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "norm_before_residual": False,
        "target_hidden_size": None,
        "transformer_layer_config": layer,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x"}},
        **{k: files.config[k] for k in top if k in files.config},
        **changes,
    }
    files.config = {k: v for k, v in files.config.items() if v != "absent"}
    files.tensors = renamed(files.tensors, "midlayer.", "layers.0.")
    return files


def as_modelopt(files, **changes):
    nested = {
        TAP_KEY: [1, 3, 4],
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        **changes,
    }
    files.config |= {"architectures": ["LlamaForCausalLM"], "eagle_config": nested}
    files.config["quantization_config"] = {"quantization": {"quant_algo": None}}
    return files


FORMATS = {
    "speculators, trained": (as_speculators, {}),
    "speculators, converted": (as_speculators, {"architecture": "Eagle3Speculator"}),
    "ModelOpt": (as_modelopt, {}),
    "ModelOpt, its own layer name": (
        lambda files: as_modelopt(renamed_files(files, "midlayer.", "layers.0.")),
        {},
    ),
    "everything under model.": (lambda files: renamed_files(files, "", "model.", 1), {}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "joint norm": {"norm_before_fc": True},
    "full vocabulary": {"draft_vocab_size": None},
}


def renamed_files(files, old: str, new: str, count: int = -1):
    files.tensors = {name.replace(old, new, count): t for name, t in files.tensors.items()}
    return files


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMATS)
def test_round_trip(form, variant, draft_files, load_draft, make_target):
    write, changes = FORMATS[form]
    target = make_target()
    files = draft_files("llama", **VARIANTS[variant])
    raw = load_draft(files, target)
    if variant == "full vocabulary" and form.startswith("ModelOpt"):
        files.config["draft_vocab_size"] = 96
    loaded = load_draft(write(files, **changes), target)
    expected, actual = raw.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert loaded.tap_layers(target) == raw.tap_layers(target) == (2, 4, 5)
    for field in ("attention", "rope", "feature_norm", "norm_output", "norm_before_residual"):
        assert getattr(loaded.config, field) == getattr(raw.config, field)


def outputs(draft, taps: list[Tensor], ids: Tensor) -> Tensor:
    hidden = draft.combine_hidden_states(taps)
    step = draft.allocate_cache(len(ids)).causal_step(len(ids))
    return draft.compute_draft_logits(draft(ids, hidden, step).post_norm_TD)


@pytest.fixture
def check_logits(oracle, assert_close):
    """`check_logits(draft, files, target, **matrices)`: one pass against the oracle."""

    def check(draft, files, target, embedding=None, head=None, tensors=None) -> None:
        table = target.model.embed_tokens.weight if embedding is None else embedding
        tensors = dict(tensors or files.tensors)
        if head is not None:
            tensors["lm_head.weight"] = head
        expected = oracle.DraftOracle(tensors, files.config, {"model.embed_tokens.weight": table})
        taps = [torch.randn(ROWS, target.config.hidden_size) for _ in range(3)]
        ids = torch.randint(0, 96, (ROWS,))
        _, logits = expected.forward(expected.features(taps), ids, torch.arange(ROWS))
        assert_close(outputs(draft, taps, ids), logits, 1e-5)

    return check


@pytest.mark.parametrize("width", [40, 24])
def test_own_embedding(width, draft_files, load_draft, make_target, check_logits):
    """A draft narrower than its target must bring its own; one as wide may."""
    target = make_target()
    files = draft_files("llama", hidden_size=width, target_hidden_size=40)
    own = files.tensors["embed_tokens.weight"] = torch.randn(96, width)
    draft = load_draft(files, target)
    assert torch.equal(draft.embed_tokens.weight, own)
    assert "embed_tokens.weight" in draft.state_dict()
    check_logits(draft, files, target, own)


def test_a_copy_of_the_targets_embedding_is_shared(draft_files, load_draft, make_target):
    files, target = draft_files("llama"), make_target()
    files.tensors["embed_tokens.weight"] = target.model.embed_tokens.weight.clone()
    draft = load_draft(files, target)
    assert draft.embed_tokens is target.model.embed_tokens
    assert "embed_tokens.weight" not in draft.state_dict()


def test_a_narrow_draft_without_an_embedding_is_refused(draft_files, load_draft, make_target):
    files = draft_files("llama", hidden_size=24, target_hidden_size=40)
    with pytest.raises(CheckpointError, match=r"hidden_size 24 .* 40, whose embedding it would"):
        load_draft(files, make_target())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "llama4"])
def test_raw_tensors_are_loaded_bit_for_bit(kind, dtype, draft_files, load_draft):
    files = draft_files(kind)
    floats = {name for name, tensor in files.tensors.items() if tensor.is_floating_point()}
    files.tensors |= {name: files.tensors[name].to(dtype) for name in floats}
    found = load_draft(files).state_dict()
    assert found.keys() == files.tensors.keys()
    assert all(torch.equal(found[n], t.to(found[n].dtype)) for n, t in files.tensors.items())


@pytest.mark.parametrize("stored", ["raw", "ModelOpt"])
def test_full_vocabulary_without_a_head_takes_the_targets(
    stored, draft_files, load_draft, make_target, check_logits
):
    target, files = make_target(), draft_files("llama", draft_vocab_size=None)
    del files.tensors["lm_head.weight"]
    if stored == "ModelOpt":
        files = as_modelopt(files, has_lm_head=False)
        files.config["draft_vocab_size"] = 96
    draft = load_draft(files, target)
    assert draft.lm_head is target.lm_head
    check_logits(draft, files, target, head=target.lm_head.weight)


def test_reduced_vocabulary_cuts_the_targets_head_where_asked(
    draft_files, load_draft, make_target, check_logits, tmp_path, caplog
):
    target, files = make_target(), draft_files("llama")
    files.tensors["lm_head.weight"][:] = 9.0  # not to be read
    kept = files.tensors["d2t"] + torch.arange(32)
    folder = files.write(tmp_path / "cut")
    draft = load_draft_(folder, target, lm_head="target")
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight[kept])
    assert "32 rows of the target's" in caplog.text
    check_logits(draft, files, target, head=target.lm_head.weight[kept])


def load_draft_(folder, target, **reading):
    return load_draft(folder, target, reading=Reading(**reading))


def test_reduced_vocabulary_with_an_announced_missing_head(draft_files, load_draft, make_target):
    target, files = make_target(), as_modelopt(draft_files("llama"), has_lm_head=False)
    del files.tensors["lm_head.weight"]
    draft = load_draft(files, target)
    kept = files.tensors["d2t"] + torch.arange(32)
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight[kept])


def test_an_own_head_can_be_insisted_on(draft_files, make_target, tmp_path):
    files = draft_files("llama", draft_vocab_size=None)
    del files.tensors["lm_head.weight"]
    folder, target = files.write(tmp_path / "draft"), make_target()
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing"):
        load_draft_(folder, target, lm_head="own")


def test_hidden_first(draft_files, make_target, tmp_path, check_logits):
    files, target = draft_files("llama"), make_target()
    right = dict(files.tensors)
    for part in "qkv":
        name = f"midlayer.self_attn.{part}_proj.weight"
        files.tensors[name] = files.tensors[name].roll(40, 1).contiguous()
    draft = load_draft_(files.write(tmp_path / "draft"), target, input_order="hidden_first")
    check_logits(draft, files, target, tensors=right)


def test_interleaved_pairs_in_a_llama_layer(draft_files, make_target, tmp_path, check_logits):
    """Pair (j, j + 8) of the published layout becomes (2 j, 2 j + 1)."""
    files, target = draft_files("llama"), make_target()
    right = dict(files.tensors)
    for part in "qk":
        name = f"midlayer.self_attn.{part}_proj.weight"
        heads = files.tensors[name].unflatten(0, (-1, 2, 8))
        files.tensors[name] = heads.transpose(1, 2).flatten(0, 2).contiguous()
    draft = load_draft_(files.write(tmp_path / "draft"), target, rotary_layout="interleaved")
    check_logits(draft, files, target, tensors=right)


YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("kind", ["llama", "llama4"])
@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.5}], ids=["usual", "own factor"])
def test_yarn(changes, kind, draft_files, make_target, load_draft, check_logits):
    """ModelOpt's exporter writes it into every draft that was trained without scaling, theta at the
    top level (`eagle_export_rope_scaling` in `modelopt/torch/speculative/config.py`); shorter."""
    target, theta = make_target(), 10000.0
    files = draft_files(kind, rope_theta=theta, rope_scaling={**YARN, **changes})
    check_logits(load_draft(files, target), files, target)


@pytest.mark.parametrize(("kind", "factor"), [("llama", "1.81"), ("llama4", "1")])
def test_yarn_of_modelopt_is_said(kind, factor, draft_files, load_draft, caplog):
    """Llama 4's layer normalises queries and keys behind RoPE, which undoes the factor."""
    caplog.set_level(logging.INFO, "aerie")
    load_draft(as_modelopt(draft_files(kind, rope_scaling=YARN)))
    said = f"rope scaling: yarn, 32 times 64 positions (scores times {factor}; its exporter"
    assert said in caplog.text


@pytest.mark.parametrize("scaling", [YARN, LLAMA3], ids=lambda scaling: scaling["rope_type"])
def test_a_scaling_can_be_left_out(scaling, draft_files, make_target, tmp_path, check_logits):
    target, plain = make_target(), draft_files("llama")
    scaled = replace(plain, config={**plain.config, "rope_scaling": scaling})
    folder = scaled.write(tmp_path / "scaled")
    check_logits(load_draft_(folder, target, rope_scaling="none"), plain, target)
    with pytest.raises(AssertionError):
        check_logits(load_draft(folder, target), plain, target)


def test_a_head_tied_to_the_drafts_embedding_is_not_taken_for_the_targets(
    draft_files, make_target, tmp_path
):
    """SGLang's `LlamaForCausalLMEagle3` makes `lm_head` the embedding where a config ties them."""
    files = draft_files("llama", draft_vocab_size=None, tie_word_embeddings=True)
    files.write(tmp_path / "its own")  # a head in the file is what it says, as in AngelSlim's files
    del files.tensors["lm_head.weight"]
    folder, target = files.write(tmp_path / "tied"), make_target()
    assert load_draft(tmp_path / "its own", target).parts.head
    with pytest.raises(CheckpointError, match=r"'tie_word_embeddings': true and no lm_head.weight"):
        load_draft(folder, target)
    assert load_draft_(folder, target, lm_head="target").lm_head is target.lm_head


@pytest.mark.parametrize(
    ("how", "stored", "marked"),
    [("target_ids", "ids", False), ("membership", "zeros", True), ("identity", "zeros", False)],
)
def test_vocabulary_map_readings(how, stored, marked, draft_files, make_target, tmp_path):
    files, target = draft_files("llama"), make_target()
    offsets = files.tensors["d2t"]
    ids = offsets + torch.arange(32)
    files.tensors["d2t"] = {"ids": ids, "zeros": torch.zeros_like(ids)}[stored]
    if marked:
        files.tensors["t2d"] = torch.zeros(96, dtype=torch.bool).index_fill(0, ids, True)
    folder = files.write(tmp_path / "draft")
    with pytest.raises(CheckpointError, match="d2t"):
        load_draft(folder, target)
    draft = load_draft_(folder, target, vocabulary_map=how)
    assert torch.equal(draft.d2t, offsets * 0 if how == "identity" else offsets)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_rounded_map_is_taken_from_t2d(prefix, draft_files, make_target, tmp_path):
    """A file cast as a whole: bfloat16 counts every number up to 256 only."""
    files, target = draft_files("llama"), make_target()
    offsets = files.tensors.pop("d2t")
    ids = offsets + torch.arange(32)
    files.tensors["t2d"] = torch.zeros(96).index_fill(0, ids, 1.0)
    files.tensors[f"{prefix}d2t"] = offsets.bfloat16()
    folder = files.write(tmp_path / "draft")
    with pytest.raises(CheckpointError, match="d2t is bfloat16, .* 'membership' takes them"):
        load_draft(folder, target)
    draft = load_draft_(folder, target, vocabulary_map="membership")
    assert torch.equal(draft.d2t, offsets)


def test_membership_must_mark_the_whole_vocabulary(draft_files, make_target, tmp_path):
    folder = draft_files("llama").write(tmp_path / "draft")
    with pytest.raises(CheckpointError, match="t2d must mark 32 target ids"):
        load_draft_(folder, make_target(), vocabulary_map="membership")


def test_quantised_weights_are_known_by_their_tensors(draft_files, load_draft):
    """ModelOpt's `hf_spec_export.py` writes the scales beside the weights; its older versions said
    what they are in `hf_quant_config.json` alone."""
    files = draft_files("llama")
    files.tensors["midlayer.mlp.up_proj.weight_scale"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"weights are quantised \(midlayer.mlp.up_proj.wei"):
        load_draft(files)


def test_a_window_is_honoured_by_refusing_what_exceeds_it(draft_files, load_draft):
    draft = load_draft(draft_files("llama", sliding_window=12, layer_types=["sliding_attention"]))
    draft.allocate_cache(12)
    with pytest.raises(ValueError, match="sliding window of 12"):
        draft.allocate_cache(13)


def test_a_window_that_is_switched_off_is_none(draft_files, load_draft):
    """As in SpecForge's `qwen2.5-vl-32b-eagle3.json`; its trainer has no windows at all."""
    draft = load_draft(draft_files("llama", sliding_window=12, use_sliding_window=False))
    assert draft.config.attention_window is None


@pytest.mark.parametrize("kind", ["eagle", "dflash", None])
def test_other_speculators_are_refused(kind, draft_files, load_draft):
    files = as_speculators(draft_files("llama"), speculators_model_type=kind)
    with pytest.raises(CheckpointError, match="'speculators_model_type'"):
        load_draft(files)


def test_speculators_without_a_layer_config_is_refused(draft_files, load_draft):
    files = as_speculators(draft_files("llama"), transformer_layer_config=None)
    with pytest.raises(CheckpointError, match="'transformer_layer_config': missing"):
        load_draft(files)


def test_an_absent_residual_flag_is_true_and_said(draft_files, load_draft, caplog):
    files = as_speculators(draft_files("llama"), norm_before_residual="absent")
    assert load_draft(files).config.norm_before_residual
    assert "norm_before_residual: true (the file does not say" in caplog.text


def test_trained_positions_do_not_cap_the_context(draft_files, load_draft, make_target, caplog):
    caplog.set_level(logging.INFO, "aerie")
    target = make_target()
    draft = load_draft(draft_files("llama", max_position_embeddings=16), target)
    draft.allocate_cache(200)
    assert "trained on 16 positions; allowed beyond" in caplog.text
