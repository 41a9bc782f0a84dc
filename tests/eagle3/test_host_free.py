"""A round reads nothing on the host: it runs on tensors that have no values.

Regimes: chains, static and dynamic trees, no draft; one sequence and several; greedy and sampled,
with rules that look at the prefix. On the meta device a read (`item`, `tolist`, a branch on a
value) raises; a GPU's own check of synchronisations is at the end.
"""

import pytest
import torch

from aerie.eagle3.generate import Decodings
from aerie.eagle3.policies import Chain, DynamicTree, StaticTree
from aerie.eagle3.rows import Pair
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Request
from tests.test_lossless import random_draft, random_target

POLICIES = {
    "chain": Chain(3),
    "static": StaticTree([[0], [1], [0, 0], [0, 1], [1, 0]]),
    "dynamic": DynamicTree(7, 3, 3),
    "none": None,
}
SAMPLINGS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(0.8, top_k=5, top_p=0.9, min_p=0.01, seed=3),
    "rules": SamplingParams(
        1.0, seed=3, repetition_penalty=1.3, frequency_penalty=0.2, min_tokens=4,
        stop_token_ids=[3], bad_words_ids=[[1], [2, 3]], logit_bias={4: 1.0},
    ),
}  # fmt: skip


def running(device: torch.device, policy, params, count: int) -> Decodings:
    """Decodings whose prompts have been read."""
    with torch.device(device):
        target = random_target(1, "triton", num_hidden_layers=4).to(device)
        draft = None if policy is None else random_draft(1, target).to(device)
        if draft is not None:
            draft.bind(target)
    requests = [Request.checked(target, [1, 2, 3 + i], 9, (), params) for i in range(count)]
    decodings = Decodings(Pair(target, draft, policy or Chain(1)), requests, count)
    for row, request in enumerate(requests):
        decodings.rows.join(row, request)
        decodings.passes.prefill(row, request, 0, 3)
    return decodings


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("policy", POLICIES)
@torch.inference_mode()
def test_a_round_needs_no_values(policy, sampling):
    for count in (1, 3):
        decodings = running(torch.device("meta"), POLICIES[policy], SAMPLINGS[sampling], count)
        decodings.passes.round(count)
        report = decodings.passes.round(count)
        depth = 0 if POLICIES[policy] is None else POLICIES[policy].depth
        assert report.numbers_BP.shape == (count, 2 + depth)
        assert report.numbers_BP.device.type == "meta"


@torch.inference_mode()
def test_a_read_would_show():
    """The control: a confidence threshold and a custom processor do read."""
    decodings = running(torch.device("meta"), Chain(3, 0.5), SamplingParams(), 1)
    with pytest.raises(RuntimeError, match="meta"):
        decodings.passes.round(1)
    custom = SamplingParams(logits_processors=[lambda ids, scores: scores])
    with pytest.raises(RuntimeError, match="meta"):
        running(torch.device("meta"), None, custom, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@torch.inference_mode()
def test_a_round_synchronises_with_nothing(policy):
    decodings = running(torch.device("cuda"), POLICIES[policy], SAMPLINGS["sampled"], 3)
    decodings.passes.round(3)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        decodings.passes.round(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
