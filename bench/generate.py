"""Tokens per second of the embedded pair: plain, speculative, and transformers' own `generate`.

All three decode the same checkpoint from the same prompt in alternation, batch 1, greedy. On a CPU
with a model this small the draft's share of a round is large; a served Llama 4 is another case.
"""

import json
import time
from statistics import median

import pytest
import torch

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.embedded import DRAFT, HELDOUT_PROMPTS, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer

NEW_TOKENS = 128
ROUNDS = 9
PROVIDERS = ("transformers", "plain", "speculative")


@pytest.fixture(scope="session")
def heldout_ids() -> list[list[int]]:
    prompts = json.loads(HELDOUT_PROMPTS.read_text())["prompts"]
    tokenizer = load_tokenizer(TARGET)
    return [tokenizer.encode(prompt["text"]).ids for prompt in prompts]


@pytest.fixture(scope="session")
def prompt_ids(heldout_ids) -> list[int]:
    return heldout_ids[0]


@pytest.fixture(scope="session")
def target(device) -> Llama4ForCausalLM:
    return Llama4ForCausalLM.from_pretrained(TARGET, torch.float32, device)


@pytest.fixture(scope="session")
def draft(target) -> Eagle3Llama4ForCausalLM:
    return Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, target)


@pytest.fixture(scope="session")
def theirs(device):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).to(device).eval()


@pytest.fixture(scope="session")
def seconds(request, prompt_ids) -> dict[str, list[float]]:
    """Times of all providers in alternation: what else the machine does falls on each alike."""
    decoders = {name: DECODERS[name](request, prompt_ids) for name in PROVIDERS}
    times: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for measured in range(-1, ROUNDS):  # the first is a warm-up
        for name, decode in decoders.items():
            start = time.perf_counter()
            decode()
            if measured >= 0:
                times[name].append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_generate(provider, request, benchmark, environment, prompt_ids, seconds):
    decode = DECODERS[provider](request, prompt_ids)
    tokens, acceptance_length = benchmark.pedantic(decode, rounds=1)
    assert tokens == NEW_TOKENS
    benchmark.extra_info |= environment | {
        "tokens": tokens,
        "acceptance_length": acceptance_length,
        "tokens_per_second": tokens / median(seconds[provider]),
    }


def bench_heldout_acceptance(benchmark, environment, target, draft, heldout_ids):
    """Acceptance at k = 4 over all drafts of all held-out prompts, 128 tokens each."""

    def decode():
        return [generate(target, ids, NEW_TOKENS, draft).stats for ids in heldout_ids]

    runs = benchmark.pedantic(decode, rounds=1)
    drafts = sum(run.num_drafts for run in runs)
    accepted = [sum(run.accepted_at[i] for run in runs) / drafts for i in range(4)]
    benchmark.extra_info |= environment | {
        "acceptance_per_position": accepted,
        "acceptance_length": 1 + sum(accepted),
    }


def _transformers(request, prompt_ids):
    model = request.getfixturevalue("theirs")
    ids = torch.tensor([prompt_ids], device=model.device)

    def decode():
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
        return out.shape[1] - ids.shape[1], 1.0

    return decode


def _ours(request, prompt_ids, with_draft: bool):
    target = request.getfixturevalue("target")
    draft = request.getfixturevalue("draft") if with_draft else None

    def decode():
        result = generate(target, prompt_ids, NEW_TOKENS, draft, eos_token_ids=())
        return len(result.tokens), result.stats.acceptance_length

    return decode


DECODERS = {
    "transformers": _transformers,
    "plain": lambda request, ids: _ours(request, ids, with_draft=False),
    "speculative": lambda request, ids: _ours(request, ids, with_draft=True),
}
