"""A round reads nothing on the host: it runs on tensors that have no values.

Regimes: chains, static and dynamic trees, drawn ones, no draft; one sequence and several; greedy
and sampled, with rules that look at the prefix. On the meta device a read (`item`, `tolist`, a
branch on a value) raises; a GPU's own check of synchronisations is at the end. Nor does a round
bring tensors of the host along, which a capture would freeze or refuse.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
    "drawn chain": Chain(3, verification="rejection"),
    "drawn tree": StaticTree([[0], [1], [0, 0], [0, 1], [1, 0]], 0.0, "rejection"),
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


class HostTensors(TorchFunctionMode):
    """Names the calls that take a tensor of the host or make one of a list; numbers are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, leaves = func.__name__, tree_leaves((args, kwargs))
        if any(isinstance(x, torch.Tensor) and x.is_cpu and x.ndim > 0 for x in leaves):
            self.found.append(name)
        is_index = name in ("__getitem__", "__setitem__")
        indices = args[1] if is_index and isinstance(args[1], tuple) else args[1:2]
        if is_index and any(isinstance(index, list) for index in indices):
            self.found.append(name)
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("policy", POLICIES)
@torch.inference_mode()
def test_a_round_brings_nothing_of_the_host(policy, sampling):
    decodings = running(torch.device("meta"), POLICIES[policy], SAMPLINGS[sampling], 3)
    for _ in range(2):
        decodings.passes.round(3)  # builds what is built once
    with HostTensors() as seen:
        decodings.passes.round(3)
    assert seen.found == []


def test_what_is_of_the_host_would_show():
    """The control: an index by a list makes a tensor on the host and copies it over."""
    x = torch.zeros(3, device="meta")
    with HostTensors() as seen:
        _ = x[[0, 2]]
        x[[0], ...] = 1.0
        torch.tensor([1.0], device="meta")
        torch.add(x, torch.ones(()))
        x.copy_(torch.zeros(3))
    assert seen.found == ["__getitem__", "__setitem__", "tensor", "copy_"]


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
