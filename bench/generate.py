"""Tokens per second of the embedded pair: plain, speculative, and transformers' own `generate`.

All of them decode one checkpoint from the same held-out prompts, in alternation, batch 1, greedy.
A speed is the median over the prompts, two runs of each. Speculation is a chain of four, and one of
up to ten that ends where the draft is no longer sure. On a CPU with a model this small the draft's
share of a round is large; a served Llama 4 is another case.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, median

import pytest
import torch

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.eagle3.policies import Chain, Policy
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.stats import Stats
from aerie.embedded import DRAFT, HELDOUT_PROMPTS, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer

NEW_TOKENS = 128
BATCH, BATCH_REPEATS = 8, 7  # prompts side by side; runs of each kind, in alternation
REPEATS = 2  # of all prompts
POLICIES = {
    "plain": None,
    "chain of 4": Chain(4),
    "chain of 10, confidence 0.35": Chain(10, confidence_threshold=0.35),
}
PROVIDERS = ("transformers", *POLICIES)
ACCEPTANCES = {
    "greedy": (0.0, Chain(4)),
    "temperature 1": (1.0, Chain(4)),
    "temperature 1, by rejection": (1.0, Chain(4, verification="rejection")),
}


@dataclass(frozen=True)
class Run:
    """One prompt decoded by one provider; `stats` of our own loop only."""

    seconds: float
    stats: Stats | None

    @property
    def acceptance_length(self) -> float:
        return 1.0 if self.stats is None else self.stats.acceptance_length


@pytest.fixture(scope="session")
def heldout_ids() -> list[list[int]]:
    prompts = json.loads(HELDOUT_PROMPTS.read_text())["prompts"]
    tokenizer = load_tokenizer(TARGET)
    return [tokenizer.encode(prompt["text"]).ids for prompt in prompts]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A second thread makes none of them faster: a step is many small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
def runs(request, heldout_ids) -> dict[str, list[Run]]:
    """Of every prompt and provider, in alternation: what else the machine does slows each."""
    runs: dict[str, list[Run]] = {name: [] for name in PROVIDERS}
    for ids in [heldout_ids[0], *REPEATS * heldout_ids]:  # the first is a warm-up
        for name in PROVIDERS:
            runs[name].append(_timed(_decoder(request, name, ids)))
    return {name: measured[1:] for name, measured in runs.items()}


def _timed(decode: Callable[[], Stats | None]) -> Run:
    start = time.perf_counter()
    stats = decode()
    return Run(time.perf_counter() - start, stats)


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_generate(provider, request, benchmark, environment, heldout_ids, runs):
    benchmark.pedantic(_decoder(request, provider, heldout_ids[0]), rounds=1)
    mine = runs[provider]
    benchmark.extra_info |= environment | {
        "tokens": NEW_TOKENS,
        "prompts": len(heldout_ids),
        "acceptance_length": mean(run.acceptance_length for run in mine),
        "tokens_per_second": NEW_TOKENS / median(run.seconds for run in mine),
    }


@pytest.mark.parametrize("kind", ["plain", "speculative"])
def bench_batches(kind, benchmark, environment, target, draft, heldout_ids):
    """Throughput of `BATCH` held-out prompts side by side, over that of the same one by one."""
    prompts, helper = heldout_ids[:BATCH], draft if kind == "speculative" else None

    def seconds(max_batch_size: int) -> float:
        start = time.perf_counter()
        generate(
            target, prompts, NEW_TOKENS, helper, eos_token_ids=(), max_batch_size=max_batch_size
        )
        return time.perf_counter() - start

    def alternate() -> list[list[float]]:
        pairs = [(seconds(1), seconds(BATCH)) for _ in range(BATCH_REPEATS)]
        return [list(times) for times in zip(*pairs, strict=True)]

    alone, together = (median(times) for times in benchmark.pedantic(alternate, rounds=1))
    tokens = BATCH * NEW_TOKENS
    benchmark.extra_info |= environment | {
        "batch": BATCH,
        "kind": kind,
        "batch_tokens_per_second": tokens / together,
        "batch_ratio": alone / together,
    }


@pytest.mark.parametrize("kind", ACCEPTANCES)
def bench_heldout_acceptance(kind, benchmark, environment, target, draft, heldout_ids):
    """Acceptance at k = 4 over all drafts of all held-out prompts, 128 tokens each, seed i."""
    temperature, policy = ACCEPTANCES[kind]

    def decode() -> list[Stats]:
        params = [SamplingParams(temperature=temperature, seed=i) for i in range(len(heldout_ids))]
        return [
            generate(target, ids, NEW_TOKENS, draft, policy=policy, sampling=own).stats
            for ids, own in zip(heldout_ids, params, strict=True)
        ]

    runs = benchmark.pedantic(decode, rounds=1)
    drafts = sum(run.num_drafts for run in runs)
    accepted = [sum(run.accepted_at[i] for run in runs) / drafts for i in range(4)]
    benchmark.extra_info |= environment | {
        "kind": kind,
        "acceptance_per_position": accepted,
        "acceptance_length": 1 + sum(accepted),
    }


def _transformers(request, prompt_ids):
    model = request.getfixturevalue("theirs")
    ids = torch.tensor([prompt_ids], device=model.device)

    def decode() -> None:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
            )
        assert out.shape[1] == ids.shape[1] + NEW_TOKENS

    return decode


def _ours(request, prompt_ids, policy: Policy | None):
    target = request.getfixturevalue("target")
    draft = None if policy is None else request.getfixturevalue("draft")

    def decode() -> Stats:
        result = generate(target, prompt_ids, NEW_TOKENS, draft, eos_token_ids=(), policy=policy)
        assert len(result.tokens) == NEW_TOKENS
        return result.stats

    return decode


def _decoder(request, provider: str, prompt_ids: list[int]) -> Callable[[], Stats | None]:
    if provider == "transformers":
        return _transformers(request, prompt_ids)
    return _ours(request, prompt_ids, POLICIES[provider])
