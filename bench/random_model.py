"""Llama 4 Scout and an EAGLE-3 draft of its shape with random weights, FP8 where they may be.

What a step takes does not depend on the values, but for the experts that the rows choose: a random
router spreads them as independent uniform choices, which is the most that rows can need.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.kernels.backend import resolve
from aerie.kernels.stream_launch import FP8
from aerie.llama4.config import Llama4Config
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.quantization import Group, Quantization

SCOUT: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 8192,
    "max_position_embeddings": 262144,
}
SMALL = SCOUT | {  # the same kinds of layers, for a CPU
    "vocab_size": 512,
    "hidden_size": 80,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "attention_chunk_size": 64,
}
DRAFT_VOCABULARY = {202048: 32000, 512: 128}
FINITE = 0b1011_0111  # bits of an e4m3 code that is neither NaN nor larger than 2


@dataclass(frozen=True)
class Pair:
    """A target and a draft that is bound to it."""

    target: Llama4ForCausalLM
    draft: Eagle3Llama4ForCausalLM


def random_pair(values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Pair:
    """All projections FP8 with a scale per channel, but for router, head and draft."""
    every = Group(("Linear",), "channel", False)
    quantization = Quantization("random", (every,), ("router", "lm_head"))
    config = Llama4Config.from_hf(values)
    target = Llama4ForCausalLM.without_values(config, "auto", device, quantization)
    _fill(target, device, dtype)
    draft_values = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": DRAFT_VOCABULARY[config.vocab_size],
        "rms_norm_eps": config.rms_norm_eps,
    }
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    draft_values |= {name: values[name] for name in (*names, "intermediate_size")}
    draft_values["eagle_config"] = {
        "eagle_aux_hidden_state_layer_ids": list(
            target.get_eagle3_default_aux_hidden_state_layers()
        )
    }
    draft_config = Eagle3Config.from_hf(draft_values, config.num_hidden_layers)
    with torch.device("meta"):
        draft = Eagle3Llama4ForCausalLM(draft_config, resolve("auto", device))
    _fill(draft, device, dtype)
    kept = torch.randperm(config.vocab_size)[: draft_config.draft_vocab_size].sort().values
    draft.d2t = (kept - torch.arange(len(kept))).to(device)
    draft.bind(target)
    return Pair(target.eval(), draft.eval())


def _fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every parameter on the meta device random values in its own layout on `device`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = _random(name, parameter, device, dtype)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def _random(name: str, like: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Gains of one, and matrices that keep the size of what they multiply."""
    is_scale = name.endswith("_scale")
    kind = like.dtype if like.dtype == FP8 or is_scale else dtype
    values = torch.empty_strided(like.shape, like.stride(), dtype=kind, device=device)
    if kind == FP8:
        values.view(torch.uint8).random_(0, 256).bitwise_and_(FINITE)
    elif is_scale:
        values.fill_(0.01)
    elif values.ndim == 1:
        values.fill_(1.0)
    else:
        values.normal_(std=values.shape[-1] ** -0.5)
    return values
