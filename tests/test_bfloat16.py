"""bfloat16: speculative and plain ids may part, and only where the target was undecided.

A pass over five rows rounds differently from a pass over one. Both runs' logits are kept by prefix
(a logits processor sees them), so the difference between the two passes is measured at every prefix
that both have. Where the ids part, the two best logits must be closer than what was measured
*elsewhere*; and in the median prefix that must be of the size of rounding. Now and then a pass
differs by far more; a router's near tie could do that, but the cause has not been traced.
`python -m tests.test_bfloat16` prints the rates over all held-out prompts.
"""

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.eagle3.policies import Chain, DynamicTree, Policy
from aerie.eagle3.sampling import SamplingParams
from aerie.embedded import DRAFT, HELDOUT_PROMPTS, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer

NUM_TOKENS = 96
ROUNDING = 2**-5  # of a text's largest logit: four units of bfloat16's last place


@dataclass
class Keeper:
    """A logits processor that changes nothing and keeps the logits behind every prefix."""

    logits: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for ids, row in zip(input_ids.tolist(), scores, strict=True):
            self.logits[tuple(ids)] = row.clone()
        return scores


@dataclass(frozen=True)
class Parting:
    """One prompt decoded both ways: the first differing token, if any, and its top-2 margin; of the
    prefixes before it the largest difference of a logit, in any and in the median one; the largest
    logit."""

    at: int | None
    margin: float
    difference: float
    typical: float
    scale: float


def compare(target, draft, prompt: list[int], policy: Policy) -> Parting:
    keepers, runs = (Keeper(), Keeper()), []
    for keeper, drafter in zip(keepers, (None, draft), strict=True):
        params = SamplingParams(logits_processors=[keeper])
        runs.append(generate(target, prompt, NUM_TOKENS, drafter, eos_token_ids=(), policy=policy,
                             sampling=params).tokens)  # fmt: skip
    plain, drafted = runs
    pairs = enumerate(zip(plain, drafted, strict=True))
    at = next((i for i, (a, b) in pairs if a != b), None)
    known = [tuple(prompt + plain[:i]) for i in range(NUM_TOKENS if at is None else at)]
    step, verify = (torch.stack([k.logits[prefix] for prefix in known]) for k in keepers)
    margin = 0.0
    if at is not None:
        logits = keepers[0].logits[tuple(prompt + plain[:at])]
        margin = float(logits[plain[at]] - logits[drafted[at]])
    differences = (step - verify).abs().amax(dim=1)
    typical = float(differences.median())
    return Parting(at, margin, float(differences.max()), typical, float(step.abs().max()))


def pair() -> tuple[Llama4ForCausalLM, Eagle3Llama4ForCausalLM]:
    target = Llama4ForCausalLM.from_pretrained(TARGET, torch.bfloat16)
    return target, Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, target)


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(TARGET)
    texts = json.loads(HELDOUT_PROMPTS.read_text())["prompts"]
    return [tokenizer.encode(prompt["text"]).ids for prompt in texts]


def unexplained(partings: list[Parting]) -> list[Parting]:
    """Those where the target was more decided than the passes differ before it, in any text; a
    margin is of two logits, each of which may differ."""
    measured = max(parting.difference for parting in partings)
    return [p for p in partings if p.at is not None and not 0 <= p.margin <= 2 * measured]


@pytest.mark.parametrize(("policy", "which"), [(Chain(4), (1, 2)), (DynamicTree(12, 4, 4), (2,))])
def test_ids_part_only_at_near_ties(policy, which):
    target, draft = pair()
    partings = [compare(target, draft, prompts()[number], policy) for number in which]
    assert unexplained(partings) == []
    for parting in partings:
        assert parting.typical <= ROUNDING * parting.scale


def test_a_decided_target_is_not_explained():
    near, far = Parting(3, 0.1, 0.125, 0.0, 20.0), Parting(3, 0.3, 0.0, 0.0, 20.0)
    assert unexplained([near, far]) == [far]
    assert unexplained([near, Parting(None, 0.0, 0.0, 0.0, 20.0)]) == []


def test_a_wrong_pass_would_not_be_explained(monkeypatch):
    """The control: verified rows that stand one position off differ by far more than rounding."""
    target, draft = pair()
    honest = type(target).forward

    def shifted(self, ids, step, *rest, **named):
        if len(ids) == 5:
            step.rows.positions_T.add_(1)
        return honest(self, ids, step, *rest, **named)

    monkeypatch.setattr(type(target), "forward", shifted)
    partings = [compare(target, draft, prompt, Chain(4)) for prompt in prompts()[2:3]]
    assert max(p.typical / p.scale for p in partings) > ROUNDING


def main() -> None:
    target, draft = pair()
    for policy in (Chain(4), DynamicTree(12, 4, 4)):
        partings = [compare(target, draft, prompt, policy) for prompt in prompts()]
        parted = [p for p in partings if p.at is not None]
        same = sum(NUM_TOKENS if p.at is None else p.at for p in partings)
        print(f"{policy}: {len(parted)} of {len(partings)} texts part, {same} tokens before that")
        print(f"  largest margin where they part {max((p.margin for p in parted), default=0):.3f}")
        print(f"  largest difference of a logit {max(p.difference for p in partings):.3f}")
        print(f"  ... in the median prefix, at most {max(p.typical for p in partings):.3f}")
        print(f"  largest logit {max(p.scale for p in partings):.1f}")
        print(f"  unexplained: {unexplained(partings)}")


if __name__ == "__main__":
    main()
