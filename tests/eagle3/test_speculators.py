"""Drafts of the speculators library, against the library's own forward pass.

The saved sample needs nothing; the rest runs where the library is installed (the extra `oracle`; it
asks for an older transformers than `constraints.txt`, so in an environment of its own).
"""

import importlib.util
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.registry import load_draft

HERE = Path(__file__).parent
SAMPLE = HERE / "speculators_sample"
TOLERANCE = 1e-5
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("speculators") is None,
    reason="the speculators library is not installed; its saved sample is tested instead",
)


@pytest.fixture
def library() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(HERE / "speculators_model.py")))


def steps(draft: Eagle3Llama4ForCausalLM, expected: dict[str, Tensor]) -> list[Tensor]:
    """Logits of each step and row that has true tokens to be fed: one row fewer per step."""
    taps, ids = expected["taps"], expected["ids"]
    rows = len(ids)
    hidden = draft.combine_hidden_states(list(taps.chunk(3, -1)))
    cache = draft.allocate_cache(rows + 3)
    output = draft(ids, hidden, cache.causal_step(rows))
    cache.commit(0, range(rows))
    found = [draft.compute_draft_logits(output.post_norm_TD)]
    deeper: list[list[Tensor]] = [[] for _ in expected["logits"][1:]]
    for row in reversed(range(rows)):
        cache.rollback(0, row + 1)
        state = output.next_hidden_TD[row : row + 1]
        for depth, level in enumerate(deeper, 1):
            if row + depth < rows:
                token = ids[row + depth : row + depth + 1]
                step = draft(token, state, cache.causal_step(1))
                cache.commit(0, [0])
                state = step.next_hidden_TD
                level.insert(0, draft.compute_draft_logits(step.post_norm_TD))
    return found + [torch.cat(level) for level in deeper]


def check(draft: Eagle3Llama4ForCausalLM, expected: dict[str, Tensor], assert_close) -> None:
    for depth, logits in enumerate(steps(draft, expected)):
        assert_close(logits, expected["logits"][depth][: len(logits)], TOLERANCE)
        assert torch.equal(logits.argmax(-1), expected["chosen"][depth][: len(logits)])


def test_the_saved_sample(make_target, assert_close):
    target = make_target()
    draft = load_draft(SAMPLE, target)
    config = draft.config
    assert (config.format, config.layer_kind) == ("speculators", "llama")
    assert draft.tap_layers(target) == (2, 4, 5)  # the library trains on inputs
    assert config.norm_before_residual
    assert config.norm_output
    assert config.feature_norm == "joint"
    check(draft, load_file(SAMPLE / "expected.safetensors"), assert_close)


def test_sample_is_small():
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) < 300e3
    assert {file.suffix for file in SAMPLE.iterdir()} == {".json", ".safetensors"}


@needs_library
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"norm_before_residual": True},
        {"fc_norm": True, "norm_output": True},
        {"draft_vocab": 96},
    ],
    ids=str,
)
def test_saved_by_the_library_now(flags, library, make_target, tmp_path, assert_close):
    model = library.make_model(**flags)
    model.save_pretrained(tmp_path / "draft")
    assert (tmp_path / "draft" / "config.py").is_file()  # code beside the weights is left alone
    draft = load_draft(tmp_path / "draft", make_target())
    check(draft, library.run_model(model), assert_close)
