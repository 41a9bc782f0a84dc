"""Random tiny Llama 4 checkpoints in every FP8 format that is read, and what they stand for.

Each writer follows its format's public description, not our loader: names and shapes are spelled
out here a second time.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
LAYERS, EXPERTS, HIDDEN, WIDTH, MLP, ROWS, VOCAB = 2, 3, 160, 128, 256, 128, 32
VALUES: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": MLP,
    "num_hidden_layers": LAYERS,
    "interleave_moe_layer_step": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": EXPERTS,
    "max_position_embeddings": 64,
}
DENSE = {"gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP)}
EXPERT = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
HEADS = {f"{name}_proj": (ROWS, HIDDEN) for name in "qkv"} | {"o_proj": (HIDDEN, ROWS)}
FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True}


@dataclass
class Checkpoint:
    """`truth` is each projection dequantised in float64, by its module name."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    truth: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        values = VALUES | ({} if self.config is None else {"quantization_config": self.config})
        (folder / "config.json").write_text(json.dumps(values))
        save_file(self.tensors, folder / "model.safetensors")
        return folder


def projections(experts_only: bool = False) -> dict[str, tuple[int, int]]:
    """Every projection but router and head, by its module name."""
    found = {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        if not experts_only:
            found |= {f"{prefix}self_attn.{name}": shape for name, shape in HEADS.items()}
            owner = "feed_forward." + ("shared_expert." if layer == 1 else "")
            shapes = EXPERT if layer == 1 else DENSE
            found |= {f"{prefix}{owner}{name}": shape for name, shape in shapes.items()}
        if layer == 1:
            for e in range(EXPERTS):
                owner = f"{prefix}feed_forward.experts.{e}."
                found |= {f"{owner}{name}": shape for name, shape in EXPERT.items()}
    return found


def unquantised(names: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """All tensors that are not among the projections `names`."""
    tensors = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.1.feed_forward.router.weight": (EXPERTS, HIDDEN),
    }
    for layer in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    rest = {n: s for n, s in projections().items() if n not in names and ".experts." not in n}
    tensors |= {f"{name}.weight": shape for name, shape in rest.items()}
    return {name: torch.randn(shape).bfloat16() for name, shape in tensors.items()}


def codes(shape: tuple[int, ...]) -> Tensor:
    """Every FP8 number but NaN."""
    bits = torch.randint(0, 127, shape, dtype=torch.uint8) + 128 * torch.randint(0, 2, shape)
    return bits.to(torch.uint8).view(FP8)


def positive(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape) + 0.5).mul(2.0**-10).to(dtype)


def compressed_tensors(strategy: str, static: bool = False, scale_dtype=torch.float32):
    """As llm-compressor writes: every projection alone, `weight_scale` beside its `weight`."""

    def build() -> Checkpoint:
        names = projections()
        weights = FLOAT8 | {"strategy": strategy, "dynamic": False}
        inputs = FLOAT8 | {"strategy": "token", "dynamic": True}
        if strategy == "block":
            weights["block_structure"] = [128, 128]
        if static:
            inputs = FLOAT8 | {"strategy": "tensor", "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        config = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["re:.*lm_head", "model.layers.1.feed_forward.router"],
            "kv_cache_scheme": None,
        }
        made = Checkpoint(unquantised(names), config)
        for name, shape in names.items():
            _separate(made, name, shape, strategy, "weight_scale", scale_dtype)
            if static:
                made.tensors[f"{name}.input_scale"] = positive(1)
        return made

    return build


def fine_grained() -> Checkpoint:
    """As DeepSeek-style files: `weight_scale_inv` per block, everything else unlisted."""
    names = projections()
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "router"],
    }
    made = Checkpoint(unquantised(names), config)
    for name, shape in names.items():
        _separate(made, name, shape, "block", "weight_scale_inv", torch.float32)
    return made


def per_tensor() -> Checkpoint:
    """As vLLM writes: the same method without blocks, activations scaled ahead."""
    names = projections()
    config = {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "ignored_layers": ["lm_head", "re:.*router"],
    }
    made = Checkpoint(unquantised(names), config)
    for name, shape in names.items():
        _separate(made, name, shape, "tensor", "weight_scale", torch.float32)
        made.tensors[f"{name}.input_scale"] = positive(1)
    return made


def fbgemm() -> Checkpoint:
    """As transformers' FbgemmFp8Llama4TextExperts: fused and input-major; all else unquantised."""
    excluded = ["lm_head", "router", "self_attn", "shared_expert", "model.layers.0.feed_forward"]
    config = {"quant_method": "fbgemm_fp8", "modules_to_not_convert": excluded}
    made = Checkpoint(unquantised(projections(experts_only=True)), config)
    owner = "model.layers.1.feed_forward.experts."
    made.tensors |= {
        f"{owner}gate_up_proj": codes((EXPERTS, HIDDEN, 2 * WIDTH)),
        f"{owner}gate_up_proj_scale": positive(EXPERTS, 1, 2 * WIDTH),
        f"{owner}down_proj": codes((EXPERTS, WIDTH, HIDDEN)),
        f"{owner}down_proj_scale": positive(EXPERTS, HIDDEN, 1),
    }
    return _with_fused_truth(made, owner, "scale")


def modelopt() -> Checkpoint:
    """As ModelOpt exports: fused experts with one flat scale, linears with theirs, KV scales."""
    names = projections()
    config = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head", "*router*", "vision_model*"],
    }
    made = Checkpoint(unquantised(names), config)
    for name, shape in names.items():
        if ".experts." not in name:
            _separate(made, name, shape, "tensor", "weight_scale", torch.float32)
            made.tensors[f"{name}.weight_scale"] = made.tensors[f"{name}.weight_scale"].view(())
            made.tensors[f"{name}.input_scale"] = positive()
    for layer in range(LAYERS):
        for part in "kv":
            made.tensors[f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"] = positive()
    owner = "model.layers.1.feed_forward.experts."
    for whole, shape in (("gate_up", (HIDDEN, 2 * WIDTH)), ("down", (WIDTH, HIDDEN))):
        made.tensors[f"{owner}{whole}_proj"] = codes((EXPERTS, *shape))
        made.tensors[f"{owner}{whole}_proj_weight_scale"] = positive()
        made.tensors[f"{owner}{whole}_proj_input_scale"] = positive()
    return _with_fused_truth(made, owner, "weight_scale")


def _separate(made: Checkpoint, name: str, shape, strategy: str, leaf: str, dtype) -> None:
    rows, columns = shape
    weight = codes(shape)
    if strategy == "block":
        scale = positive(-(-rows // 128), -(-columns // 128), dtype=dtype)
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    else:
        scale = (
            positive(rows, 1, dtype=dtype) if strategy == "channel" else positive(1, dtype=dtype)
        )
        spread = scale
    made.tensors |= {f"{name}.weight": weight, f"{name}.{leaf}": scale}
    made.truth[name] = weight.double() * spread.double()


def _with_fused_truth(made: Checkpoint, owner: str, leaf: str) -> Checkpoint:
    for whole in ("gate_up_proj", "down_proj"):
        weight, scale = made.tensors[owner + whole], made.tensors[f"{owner}{whole}_{leaf}"]
        if whole == "down_proj" and scale.ndim == 3:
            scale = scale.mT
        wide = (weight.double() * scale.double()).mT
        parts = wide.chunk(2, dim=1) if whole == "gate_up_proj" else (wide,)
        names = ("gate_proj", "up_proj") if whole == "gate_up_proj" else ("down_proj",)
        for name, part in zip(names, parts, strict=True):
            made.truth |= {f"{owner}{e}.{name}": part[e] for e in range(EXPERTS)}
    return made


FORMATS: dict[str, Callable[[], Checkpoint]] = {
    "compressed-tensors channel": compressed_tensors("channel", scale_dtype=torch.bfloat16),
    "compressed-tensors tensor": compressed_tensors("tensor", static=True),
    "compressed-tensors block": compressed_tensors("block"),
    "fp8 block": fine_grained,
    "fp8 tensor": per_tensor,
    "fbgemm": fbgemm,
    "modelopt": modelopt,
}
