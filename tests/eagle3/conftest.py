"""Random tiny drafts in the raw layout, and random tiny targets for them."""

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.kernels.backend import Backend
from aerie.llama4.config import Llama4Config
from aerie.llama4.model import Llama4ForCausalLM

TARGET: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 40,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "moe_layers": [],
    "attention_chunk_size": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 500000.0,
    "model_type": "llama4_text",
    "architectures": ["Llama4ForCausalLM"],
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "vocab_size": 96,
    "draft_vocab_size": 32,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 1,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16,
}
LLAMA4: dict[str, Any] = {
    **LLAMA,
    "architectures": ["Eagle3Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size_mlp": 48,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 4,
    "attn_scale": 0.3,
}
KINDS = {"llama": LLAMA, "llama4": LLAMA4}


@dataclass
class CheckpointFiles:
    """A checkpoint before it is written: change `config` or `tensors`, then `write` it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "model.safetensors")
        return folder


def with_changes(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A change to None removes the key."""
    return {k: v for k, v in {**values, **changes}.items() if v is not None}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Well away from initialisation's 0.02, so that every term moves the logits."""
    return {
        name: torch.randn(shape) * (0.2 if len(shape) > 1 else 0.5) + float("norm" in name)
        for name, shape in shapes.items()
    }


def draft_shapes(config: dict[str, Any], target_width: int) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a raw checkpoint, without maps."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    inner = config.get("intermediate_size_mlp", config["intermediate_size"])
    vocab = config.get("draft_vocab_size", config["vocab_size"])
    layer = {
        "self_attn.q_proj.weight": (q, 2 * width),
        "self_attn.k_proj.weight": (kv, 2 * width),
        "self_attn.v_proj.weight": (kv, 2 * width),
        "self_attn.o_proj.weight": (width, q),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "hidden_norm.weight": (width,),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if config.get("attention_bias"):
        layer |= {
            name.replace("weight", "bias"): (shape[0],)
            for name, shape in layer.items()
            if "self_attn" in name
        }
    outside = {
        "fc.weight": (width, 3 * target_width),
        "norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    nested = config.get("eagle_config", {})
    if config.get("norm_before_fc", nested.get("norm_before_fc")):
        outside["input_norm.weight"] = (3 * target_width,)
    if config.get("fc_norm"):
        outside |= {f"fc_norm.{i}.weight": (target_width,) for i in range(3)}
    return outside | {f"midlayer.{name}": shape for name, shape in layer.items()}


def new_folder(tmp_path: Path) -> Path:
    """Never one that was used: loaded weights may still be mapped from its file."""
    return tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"


@pytest.fixture
def draft_config():
    """`draft_config(kind, **changes)`: raw `config.json` of a tiny `llama` or `llama4` draft."""
    return lambda kind, **changes: with_changes(KINDS[kind], changes)


@pytest.fixture
def draft_files(draft_config):
    """`draft_files(kind, **changes)`: config and random tensors of a raw draft checkpoint."""

    def make(kind: str, **changes) -> CheckpointFiles:
        config = draft_config(kind, **changes)
        tensors = random_weights(draft_shapes(config, TARGET["hidden_size"]))
        if "draft_vocab_size" in config:
            kept = torch.randperm(config["vocab_size"])[: config["draft_vocab_size"]].sort().values
            tensors["d2t"] = kept - torch.arange(len(kept))
        return CheckpointFiles(config, tensors)

    return make


@pytest.fixture
def make_target(tmp_path):
    """`make_target(**changes)`: a random target, saved in HF layout and loaded."""

    def make(**changes) -> Llama4ForCausalLM:
        values = with_changes(TARGET, changes)
        with torch.device("meta"):
            empty = Llama4ForCausalLM(Llama4Config.from_hf(values))
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        folder = CheckpointFiles(values, random_weights(shapes)).write(new_folder(tmp_path))
        return Llama4ForCausalLM.from_pretrained(folder)

    return make


@pytest.fixture
def load_draft(tmp_path, make_target):
    """`load_draft(files, target=None, backend=None)`; a new target if none is given."""

    def load(
        files: CheckpointFiles,
        target: Llama4ForCausalLM | None = None,
        backend: Backend | None = None,
    ) -> Eagle3Llama4ForCausalLM:
        target = target or make_target()
        return Eagle3Llama4ForCausalLM.from_pretrained(
            files.write(new_folder(tmp_path)), target, backend
        )

    return load


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """`oracle.DraftOracle`, `oracle.ChainOracle` and `oracle.tapped_outputs`, see oracle.py."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("oracle.py"))))
