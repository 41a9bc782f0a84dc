"""The rebuild of the embedded pair: training models compute what is served, stages are safe.

Training models are written for speed, so each is compared with a plain way to the same numbers.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Llama4ForCausalLM

from aerie.assets.build import acceptance, distill, stages
from aerie.assets.build.choices import CHOICES, train_draft
from aerie.assets.build.draft import Draft
from aerie.assets.build.draft_attention import RowCache
from aerie.assets.build.optimizer import orthogonalised
from aerie.assets.build.results import RESULTS
from aerie.assets.build.stages import STAGES, Rebuild
from aerie.assets.build.target import new_target, target_config
from aerie.embedded import ASSETS

UNTRAINED = [name for name in RESULTS if not name.endswith("model.safetensors")]


def content(path: Path) -> bytes | dict:
    """A model's configs but for the version of transformers that wrote them."""
    if not path.name.endswith("config.json"):
        return path.read_bytes()
    values = json.loads(path.read_text())
    values.pop("transformers_version", None)
    return values


@pytest.fixture
def target():
    torch.manual_seed(0)
    model = new_target("cpu")
    with torch.no_grad():  # at the initial scale every layer hardly matters
        for parameter in model.model.layers.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


@torch.no_grad()
def test_training_target_is_transformers_llama4(target):
    theirs = Llama4ForCausalLM(target_config()).eval()
    theirs.load_state_dict(target.state_dict())
    ids_BT = torch.randint(3, 1024, (2, 256))
    expected = theirs(ids_BT, output_hidden_states=True)
    actual = target(ids_BT)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for entry, hidden in zip(actual.entries, expected.hidden_states, strict=False):
        torch.testing.assert_close(entry, hidden, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_continuation_is_recomputation(target):
    """Across a chunk's edge at 128, where the rotary layers forget."""
    prompt_BT = torch.randint(3, 1024, (2, 100))
    ids_BT = target.greedy(prompt_BT, 140)
    # 140 is no whole number of chunks, so the rows are filled up; causality hides the filling.
    filled_BT = torch.cat([ids_BT, ids_BT.new_full((2, 116), 5)], dim=1)
    best_BT = target(filled_BT).logits.argmax(-1)
    assert torch.equal(ids_BT[:, 100:], best_BT[:, 99:139])


@torch.no_grad()
def test_unrolled_rows_are_chains():
    """Level s of row i is the last row of a plain causal pass over rows 0..i and its own chain."""
    torch.manual_seed(0)
    draft = Draft(torch.arange(768))
    taps_1TC, embed_1TD = torch.randn(1, 12, 384), torch.randn(1, 12, 128)
    row_P = torch.tensor([0, 3, 7])
    levels = draft.unroll(taps_1TC, embed_1TD, row_P, 4)
    for index, row in enumerate(row_P.tolist()):
        hidden = draft.fc(taps_1TC[:, : row + 1])
        for level in range(4):
            size = row + 1 + level
            out = draft.midlayer(
                embed_1TD[:, 1 : size + 1], hidden, torch.arange(size), 0, RowCache()
            )
            logits_U = draft.lm_head(draft.norm(out[0, -1]))
            torch.testing.assert_close(levels[level][0, index], logits_U, rtol=1e-4, atol=1e-4)
            hidden = torch.cat([hidden, out[:, -1:]], dim=1)


def test_orthogonalised_matrices_have_singular_values_near_one():
    for shape in ((3, 64, 128), (3, 128, 64)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(*shape)))
        assert 0.5 < values.min() <= values.max() < 1.4


@pytest.fixture
def small(monkeypatch, tmp_path) -> Rebuild:
    """A rebuild of one short step a leg."""
    for name in ("ALONE", "TOGETHER", "OWN_TEXT", "CHOICES"):
        leg = replace(getattr(stages, name), steps=1, topic_rows=1, row_length=48)
        monkeypatch.setattr(stages, name, leg)
    plan = distill.Distillation(batches=1, rows=5, row_length=48, longest_prompt=32)
    monkeypatch.setattr(distill, "Distillation", lambda: plan)
    monkeypatch.setattr(acceptance, "NEW_TOKENS", 4)
    return Rebuild(tmp_path, 0, "cpu")


def test_choices_leave_the_target_alone_and_the_draft_learns_them(target, capsys):
    torch.manual_seed(0)
    draft = Draft(torch.arange(768))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    ids_BT = target.greedy(torch.randint(3, 768, (4, 16)), 64)
    train_draft(replace(CHOICES, steps=60, own_rows=4), target, draft, ids_BT)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())
    first, *_, last = re.findall(r"reached (\S+)", capsys.readouterr().err)
    assert float(last) > float(first) + 0.2


def test_dead_pair_is_not_installed_and_the_rebuild_can_go_on(small, monkeypatch):
    """What lies in the folder stays until every file that replaces it is complete and measured."""
    before = small.out / "target" / "model.safetensors"
    before.parent.mkdir()
    before.write_text("the weights of before")
    for stage in STAGES[:-1]:
        getattr(small, stage)()
    with pytest.raises(SystemExit, match=r"at least 2\.6, got 1\."):
        small.finish()
    assert before.read_text() == "the weights of before"
    assert sorted(path.name for path in small.out.iterdir()) == ["target", "unfinished"]
    monkeypatch.setattr(stages, "HELD_OUT_FLOOR", 1.0)
    small.finish()
    for name in UNTRAINED:
        assert content(small.out / name) == content(ASSETS / name), name
    written = sorted(p.relative_to(small.out) for p in small.out.rglob("*") if p.is_file())
    assert [str(path) for path in written] == sorted(RESULTS)


def test_a_stage_without_its_predecessor_says_so(small):
    small.text()
    with pytest.raises(SystemExit, match="run stage 'alone' first"):
        small.together()
