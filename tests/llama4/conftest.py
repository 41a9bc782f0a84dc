"""Random tiny Llama 4 checkpoints in transformers' format, and its own model of them."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from aerie.llama4.model import Llama4ForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 16,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 8,
    "attn_scale": 0.1,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass
class Pair:
    """One checkpoint, loaded by transformers and by us."""

    theirs: Any
    ours: Llama4ForCausalLM
    folder: Any = field(repr=False)


@pytest.fixture
def make_pair(tmp_path):
    """`make_pair(seed, backend="eager", **changes)` builds, saves and loads a random checkpoint."""
    from transformers import Llama4ForCausalLM as TheirLlama4
    from transformers import Llama4TextConfig

    def make(seed: int, backend="eager", **changes) -> Pair:
        torch.manual_seed(seed)
        config = Llama4TextConfig(**{**BASE, **changes})
        config._attn_implementation = "eager"
        theirs = TheirLlama4(config).eval().requires_grad_(False)
        for name, parameter in theirs.named_parameters():
            # well away from initialisation's 0.02, so that every term moves the logits
            spread = 0.2 if parameter.ndim > 1 else 0.5
            parameter.data.normal_(1.0 if "norm" in name else 0.0, spread)
        folder = tmp_path / f"target-{seed}"
        theirs.save_pretrained(folder)
        return Pair(theirs, Llama4ForCausalLM.from_pretrained(folder, backend=backend), folder)

    return make
