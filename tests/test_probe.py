"""`aerie probe` on the embedded pair, broken in every way it knows: it names the right fault.

Taps one layer late cost this pair 4 of 76 first tokens, so that break needs all texts; the others
show in a third of them. The intact draft is never "fixed".
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from aerie.cli import app
from aerie.eagle3.acceptance import FLOOR, Measured, measure, transcribe
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.probe import Candidate, Trial, compare, diagnose, probe
from aerie.eagle3.reading import AS_WRITTEN, Reading
from aerie.eagle3.registry import load_draft
from aerie.embedded import DRAFT, TARGET
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM
from aerie.probing import probe_prompts, verdict_lines
from aerie.text import load_tokenizer

TAP_KEY = "eagle_aux_hidden_state_layer_ids"
FEW, TOKENS = 4, 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TARGET)


@pytest.fixture(scope="module")
def target() -> Llama4ForCausalLM:
    return Llama4ForCausalLM.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def texts(target, tokenizer):
    """All layers are recorded, so one set of texts serves every break."""
    prompts = probe_prompts(None, True, tokenizer)
    return [transcribe(target, prompt, TOKENS, set(range(13))) for prompt in prompts]


@pytest.fixture
def break_draft(tmp_path):
    """`break_draft(config_changes, tensor_change)`: an edited copy of the embedded draft."""

    def edit(changes: dict, change=lambda tensors: None) -> Path:
        folder = shutil.copytree(DRAFT, tmp_path / "broken")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return edit


def each(parts: str, change):
    def edit(tensors) -> None:
        for part in parts:
            name = f"midlayer.self_attn.{part}_proj.weight"
            tensors[name] = change(tensors[name]).contiguous()

    return edit


def interleave(rows):
    return rows.unflatten(0, (-1, 2, 16)).transpose(1, 2).flatten(0, 2)


def store_target_ids(tensors) -> None:
    tensors["d2t"] += torch.arange(768)
    del tensors["t2d"]


def lose_offsets(tensors) -> None:
    tensors["d2t"] *= 0


YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 2048}
# changes of the config and tensors -> the fault to be named, the override to be advised
BREAKS = {
    "taps one layer early": (
        ({TAP_KEY: [0, 4, 7]}, lambda tensors: None),
        ("taps read one layer early", {"tap_ids": [2, 6, 9], "tap_convention": "input_to"}),
    ),
    "RoPE pairs": (
        ({}, each("qk", interleave)),
        ("RoPE pairs read as half", {"rotary_layout": "interleaved"}),
    ),
    "RoPE scaling": (  # of ModelOpt's exporter, for a draft that was trained without
        ({"rope_scaling": YARN}, lambda tensors: None),
        ("RoPE scaled as the file says", {"rope_scaling": "none"}),
    ),
    "norm_before_residual": (
        ({"norm_before_residual": True}, lambda tensors: None),
        ("norm_before_residual read as true", {"norm_before_residual": False}),
    ),
    "order": (
        ({}, each("qkv", lambda rows: rows.roll(128, 1))),
        ("attention input read as embedding_first", {"input_order": "hidden_first"}),
    ),
    "target ids": (
        ({}, store_target_ids),
        ("d2t holds target ids", {"vocabulary_map": "target_ids"}),
    ),
    "identity d2t": (
        ({}, lose_offsets),
        ("d2t is wrong, t2d is not", {"vocabulary_map": "membership"}),
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_names_the_fault(case, break_draft, target, texts):
    edits, (fault, override) = BREAKS[case]
    found = compare(break_draft(*edits), target, texts[:FEW])
    refused = "d2t" in fault
    assert found.verdict == ("unreadable" if refused else "misread")
    assert [trial.candidate.mistake for trial in found.better] == [fault]
    (best,) = found.better
    assert best.candidate.reading.as_dict() == override
    assert best.measured is not None
    assert best.measured.acceptance[0] > 0.6
    shown = "\n".join(verdict_lines(found))
    assert fault in shown
    assert json.dumps(override) in shown


def test_names_taps_one_layer_late(break_draft, target, texts):
    """Ids of inputs in a file that is read as naming outputs; the convention alone corrects it."""
    modelopt = {"use_last_layernorm": True, TAP_KEY: [2, 6, 9]}
    found = compare(break_draft({TAP_KEY: None, "eagle_config": modelopt}), target, texts)
    assert found.verdict == "misread"
    assert [t.candidate.mistake for t in found.better] == ["taps read one layer late"]
    assert found.better[0].candidate.reading.as_dict() == {"tap_convention": "input_to"}


def test_names_norm_output(target, texts):
    """It shows from the second position on: the first is the same either way."""
    found = compare(DRAFT, target, texts[:FEW], Reading(norm_output=True))
    assert [t.candidate.mistake for t in found.better] == ["norm_output read as true"]
    assert found.better[0].candidate.reading.as_dict() == {"norm_output": False}


def test_never_fixes_the_intact_draft(target, texts):
    found = compare(DRAFT, target, texts)
    assert (found.verdict, found.better, found.not_told_apart) == ("alive", (), ())
    assert len(found.trials) == 7
    assert all(trial.gain is not None and trial.gain < 0 for trial in found.trials)


def test_a_dead_draft_is_called_dead(break_draft, target, texts):
    def shuffle(tensors) -> None:
        for name in ("fc.weight", "midlayer.mlp.down_proj.weight", "lm_head.weight"):
            tensors[name] = tensors[name][torch.randperm(len(tensors[name]))]

    found = compare(break_draft({}, shuffle), target, texts[:FEW])
    assert found.verdict == "dead"
    assert not found.written.is_alive
    assert "no single known mistake" in "\n".join(verdict_lines(found))


def test_acceptance_is_that_of_generation(target, tokenizer):
    """At every start the chain of the probe accepts what a round starting there would."""
    draft = load_draft(DRAFT, target)
    prompt = probe_prompts(None, True, tokenizer)[0]
    text = transcribe(target, prompt, 24, set(draft.tap_layers(target)))
    measured = measure(draft, draft.tap_layers(target), [text], 3)
    for start in range(0, 16, 3):
        length = text.prompt_length - 1 + start  # a round whose root is the token at `length`
        run = Decoding(target, text.ids[:length], 8, draft, 3, eos_token_ids=())
        root, first_round, *_ = run
        assert list(root) == [text.ids[length]]
        assert measured.hits_NP[start].cumprod(0).sum() == len(first_round) - 1


def test_log_probabilities_are_those_of_a_chain_by_itself(target, tokenizer):
    """The second position behind each start, with a cache that holds nothing but its chain."""
    draft = load_draft(DRAFT, target)
    layers = draft.tap_layers(target)
    text = transcribe(target, probe_prompts(None, True, tokenizer)[0], 20, set(layers))
    measured = measure(draft, layers, [text], 2)
    ids, known = torch.tensor(text.ids), draft.d2t + torch.arange(768)
    taps = [text.taps[layer] for layer in layers]
    assert len(measured.log_probs_NP) == 17
    for start, log_prob in enumerate(measured.log_probs_NP[:, 1].tolist()):
        row = text.prompt_length - 2 + start
        cache = draft.allocate_cache(row + 2)
        hidden = draft.combine_hidden_states([tap[: row + 1] for tap in taps])
        first = draft(ids[1 : row + 2], hidden, cache.causal_step(row + 1))
        cache.commit(0, range(row + 1))
        step = cache.causal_step(1)
        second = draft(ids[row + 2 : row + 3], first.next_hidden_TD[-1:], step)
        scores = draft.compute_draft_logits(second.post_norm_TD)[0].log_softmax(-1)
        (place,) = (known == ids[row + 3]).nonzero().flatten().tolist() or [None]
        expected = FLOOR if place is None else max(float(scores[place]), FLOOR)
        assert abs(log_prob - expected) < 1e-4


def scored(log_probs: torch.Tensor) -> Measured:
    return Measured(torch.ones_like(log_probs, dtype=torch.bool), log_probs)


def test_small_or_uncertain_gains_are_no_fault():
    written = Trial(Candidate("as written", AS_WRITTEN), scored(torch.zeros(64, 2)))
    for gain, certainty, is_better in ((0.5, 3.9, False), (0.005, 90.0, False), (0.5, 4.1, True)):
        other = Trial(Candidate("x", Reading()), written.measured, gain, certainty)
        assert bool(diagnose(written, [other]).better) == is_better


def test_bad_input(target, tmp_path):
    with pytest.raises(ValueError, match="at least one prompt"):
        probe(DRAFT, target, [])
    with pytest.raises(ValueError, match="12 tokens"):
        probe(DRAFT, target, [[1, 2, 3]], num_tokens=5)
    (tmp_path / "config.json").write_text('{"architectures": ["MedusaModel"]}')
    with pytest.raises(CheckpointError, match="MedusaModel"):
        probe(tmp_path, target, [[1, 2, 3]])


def test_command_line(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(["The with statement", "A class definition is"]))
    arguments = ("probe", "--prompt-file", str(file), "--num-tokens", "16", "--device", "cpu")
    result = CliRunner().invoke(app, [*arguments, "--json"])
    printed = json.loads(result.stdout)
    assert result.exit_code == (0 if printed["verdict"] == "alive" else 1)
    assert printed["written"]["starts"] == 2 * 13
    assert len(printed["written"]["acceptance_per_position"]) == 4
    assert {reading["mistake"] for reading in printed["readings"]} >= {"taps read one layer late"}


@pytest.mark.parametrize(
    ("content", "message"), [("[1]", "JSON list of texts"), ("[", "not valid JSON")]
)
def test_bad_prompt_file(content, message, tmp_path):
    (tmp_path / "prompts").write_text(content)
    result = CliRunner().invoke(app, ["probe", "--prompt-file", str(tmp_path / "prompts")])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_target_of_ones_own_needs_a_draft():
    result = CliRunner().invoke(app, ["probe", "--model", str(TARGET)])
    assert result.exit_code == 2
    assert "--draft" in result.stderr


def test_chat_models_get_turns(tokenizer):
    texts = probe_prompts(None, False, tokenizer)
    assert len(texts) == 8
    assert all(0 < len(text) <= 256 for text in texts)
