"""The shipped pair: what it is, and that its draft is alive.

A broken draft stays lossless, so only a floor under the acceptance shows it. The floors lie under
what was measured when the pair was trained (assets/NOTICE.md); float32 greedy decoding is
deterministic, so they leave room for another torch's rounding, not for luck.
"""

import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.embedded import ASSETS, DRAFT, HELDOUT_PROMPTS, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer

HELDOUT_FLOOR = 3.1  # acceptance length at k = 4, mean over all held-out prompts
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TARGET)


@pytest.fixture(scope="module")
def target() -> Llama4ForCausalLM:
    return Llama4ForCausalLM.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def draft(target) -> Eagle3Llama4ForCausalLM:
    return Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, target)


def acceptance_length(target, draft, prompts: list[list[int]]) -> float:
    """Over all drafts of all prompts; every run is checked against plain decoding on the way."""
    drafts = accepted = 0
    for prompt in prompts:
        speculative = generate(target, prompt, NEW_TOKENS, draft, 4)
        assert speculative.tokens == generate(target, prompt, NEW_TOKENS).tokens
        drafts += speculative.stats.num_drafts
        accepted += speculative.stats.num_accepted_tokens
    return 1 + accepted / drafts


def heldout(tokenizer) -> list[list[int]]:
    prompts = json.loads(HELDOUT_PROMPTS.read_text())["prompts"]
    return [tokenizer.encode(prompt["text"]).ids for prompt in prompts]


def test_acceptance_on_heldout_prompts(target, draft, tokenizer):
    assert acceptance_length(target, draft, heldout(tokenizer)) >= HELDOUT_FLOOR


def test_taps_one_layer_early_lower_the_acceptance(target, draft, tokenizer):
    """Outputs' ids read as inputs: a common silent mistake (3.44 -> 3.10)."""
    prompts = heldout(tokenizer)[:12]
    right = acceptance_length(target, draft, prompts)
    layers = target.get_eagle3_default_aux_hidden_state_layers()
    early = tuple(layer - 1 for layer in layers)
    config = draft.config
    try:
        draft.config = replace(config, aux_hidden_state_layers=early)
        shifted = acceptance_length(target, draft, prompts)
    finally:
        draft.config = config
    assert shifted < right - 0.1


def test_fp8_cache_stays_close_and_lossless(target, draft, tokenizer):
    """2 to 3 % of the logits' norm here; the tokens are the same with a draft and without."""
    for prompt in heldout(tokenizer)[:3]:
        plain = generate(target, prompt, NEW_TOKENS, kv_cache_dtype="fp8")
        speculative = generate(target, prompt, NEW_TOKENS, draft, 4, kv_cache_dtype="fp8")
        assert speculative.tokens == plain.tokens
        ids = torch.tensor(prompt + plain.tokens)
        with torch.inference_mode():
            exact, fp8 = (
                target(
                    ids, target.allocate_cache(200, kv_cache_dtype=kind).causal_step(len(ids))
                ).logits_TV
                for kind in ("auto", "fp8")
            )
        assert 1e-3 < (fp8 - exact).norm() / exact.norm() < 0.06
        assert (fp8.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_greedy_text_is_english(target, tokenizer):
    """Words of its own domain, not noise: most words of a continuation occur in the corpus."""
    known = set(re.findall(r"[a-z]+", (ASSETS / "corpus.txt").read_text().lower()))
    ids = tokenizer.encode("The with statement").ids
    text = tokenizer.decode(generate(target, ids, 128).tokens)
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 30
    assert sum(word in known for word in words) / len(words) > 0.9


def test_config_shows_every_feature(target, draft):
    config = target.config
    assert config.num_hidden_layers >= 8
    assert len(set(target.get_eagle3_default_aux_hidden_state_layers())) == 3
    assert 0 < len(config.moe_layers) <= config.num_hidden_layers
    assert 0 < sum(config.no_rope_layers) < config.num_hidden_layers
    assert config.attention_chunk_size is not None
    assert config.attention_chunk_size % 128 == 0
    assert config.use_qk_norm
    assert config.temperature is not None
    assert config.temperature.floor_scale < config.max_position_embeddings
    assert draft.config.draft_vocab_size < config.vocab_size
    assert draft.d2t.any()


def test_transformers_loads_the_target(target, tokenizer):
    """The files are Hugging Face's own format: transformers computes the same logits from them."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    ids = torch.tensor(heldout(tokenizer)[0])
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
        cache = target.allocate_cache(len(ids))
        actual = target(ids, cache.causal_step(len(ids))).logits_TV
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_size_and_checksums():
    files = [*TARGET.iterdir(), *DRAFT.iterdir()]
    assert sum(file.stat().st_size for file in files) < 12e6
    notice = (ASSETS / "NOTICE.md").read_text()
    for file in [*files, ASSETS / "corpus.txt"]:
        if file.suffix in (".safetensors", ".txt") or file.name == "tokenizer.json":
            assert hashlib.sha256(file.read_bytes()).hexdigest() in notice, file.name
