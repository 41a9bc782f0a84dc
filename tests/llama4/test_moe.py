"""One quantisation of a prompt's rows serves the shared expert and the routed ones.

Regimes: scales of a kind and not; few rows, which the shared expert reads as they are; a shared
expert that is not FP8, routed ones that are not.
"""

import pytest
import torch

from aerie.kernels.rms_norm import RMSNorm
from aerie.llama4.config import Llama4Config
from aerie.llama4.moe import MoE
from aerie.llama4.weight_quantization import quantize_weight
from tests.evidence import normal
from tests.llama4.test_mlp import fill

WIDTH, EXPERTS, NARROW = 256, 3, 48  # narrow: for the interpreter, which knows one block then
CONFIG = {
    "model_type": "llama4_text",
    "vocab_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 64,
}


def moe_of(routed: str, shared: str, width: int, backend, device) -> MoE:
    """Weights "plain", or FP8 with scales per "channel" or "block"."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "intermediate_size_mlp"), width)
    moe = MoE(Llama4Config.from_hf(CONFIG | sizes), backend)
    for seed, parameter in enumerate(moe.parameters()):
        parameter.data.copy_(normal(parameter.shape, torch.float32, "cpu", seed) * width**-0.5)
    experts, mlp = moe.experts, moe.shared_expert
    if routed != "plain":
        wide = experts.gate_up_proj.data.clone(), experts.down_proj.data.clone()
        experts.hold_fp8("block" if routed == "block" else "channel", has_input_scale=False)
        for weight, matrix in zip(wide, (experts.gate_up, experts.down), strict=True):
            assert matrix.scale is not None
            quantize_weight(weight, matrix.weight.data, matrix.scale.data)
    if shared != "plain":
        for linear in (mlp.gate_up_proj, mlp.down_proj):
            fill(linear, linear.weight.data.clone(), shared == "block")
    return moe.to(device)


def counted(moe: MoE, monkeypatch) -> list[int]:
    """Widths of the rows that the shared expert quantises itself."""
    widths: list[int] = []
    for owner in (moe.shared_expert, moe.shared_expert.down_proj):
        own = owner._quantize

        def quantize(x, *arguments, own=own):
            widths.append(x.shape[1])
            return own(x, *arguments)

        monkeypatch.setattr(owner, "_quantize", quantize)
    return widths


KINDS = [  # weights of the routed experts and of the shared one, what is quantised for the latter
    ("channel", "channel", 1),  # only the rows in front of `down`
    ("block", "block", 1),
    ("channel", "block", 2),
    ("block", "channel", 2),
    ("plain", "channel", 2),
    ("channel", "plain", 0),
]


def check(routed: str, shared: str, quantisations: int, width: int, backend, monkeypatch, device):
    moe = moe_of(routed, shared, width, backend, device)
    x = normal((3, width), torch.float32, device)
    norm = RMSNorm(width, 1e-5, backend).to(device)
    norm.weight.data.fill_(1.0)
    entry = moe.enter(x, torch.zeros_like(x), norm)
    as_it_is, in_codes = (moe.shared_expert(entry.normed_TD, q) for q in (False, True))
    widths = counted(moe, monkeypatch)
    of_few = moe(entry)
    assert widths == []
    of_prompt = moe(entry, quantises=True)
    assert len(widths) == quantisations
    torch.testing.assert_close(of_prompt - of_few, in_codes - as_it_is, atol=1e-5, rtol=0)
    assert torch.equal(of_prompt, of_few) == (shared == "plain")


@pytest.mark.parametrize(("routed", "shared", "quantisations"), KINDS)
def test_codes_are_shared(routed, shared, quantisations, monkeypatch, device):
    check(routed, shared, quantisations, WIDTH, "eager", monkeypatch, device)


@pytest.mark.parametrize("kinds", [KINDS[0], KINDS[4]])
def test_codes_are_shared_by_the_kernels(kinds, monkeypatch, device):
    check(*kinds, NARROW, "triton", monkeypatch, device)
