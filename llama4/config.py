"""The Llama 4 text model's configuration, read once from a Hugging Face `config.json`.

Every upstream quirk is absorbed here: text-only and multimodal files, `rope_parameters` (of
transformers 5) and `rope_theta`/`rope_scaling` (older), lists that may be absent or empty.
In `no_rope_layers` a 1 means RoPE and a 0 means none (NoPE); NoPE layers attend globally.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aerie.llama4.attention_config import (
    AttentionSpec,
    RopeConfig,
    Temperature,
    check_heads,
    read_rope,
    read_temperature,
)
from aerie.llama4.json_fields import (
    CheckpointError,
    flag,
    integer,
    integers,
    number,
    read_config,
    read_fields,
    read_json,
    strings,
)

MULTIMODAL = "Llama4ForConditionalGeneration"
ARCHITECTURES = ("Llama4ForCausalLM", MULTIMODAL)


@dataclass(frozen=True)
class Llama4Config:
    """Field names are those of transformers' `Llama4TextConfig`; lists are complete tuples here."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int  # each expert, and the shared expert
    intermediate_size_mlp: int  # dense layers
    num_local_experts: int
    num_experts_per_tok: int
    moe_layers: tuple[int, ...]
    no_rope_layers: tuple[int, ...]
    chunked_layers: tuple[bool, ...]
    attention_chunk_size: int | None
    use_qk_norm: bool
    temperature: Temperature | None
    rope: RopeConfig
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Llama4Config":
        """Reads `config.json`, and the end tokens of `generation_config.json` if it has some."""
        values = read_config(folder)
        config = cls.from_hf(values)
        generation = folder / "generation_config.json"
        if not generation.is_file():
            return config
        end_tokens = integers(read_json(generation), "eos_token_id")
        config = replace(config, eos_token_ids=end_tokens or config.eos_token_ids)
        config._check()
        return config

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "Llama4Config":
        """From the parsed JSON. Raises CheckpointError: a line for each key that is wrong, with its
        value and the rule."""
        values = _text_part(values)

        def num_layers() -> int:
            return integer(values, "num_hidden_layers")

        def num_heads() -> int:
            return integer(values, "num_attention_heads")

        def hidden_size() -> int:
            return integer(values, "hidden_size")

        def no_rope() -> tuple[int, ...]:
            return _no_rope_layers(values, num_layers())

        fields = read_fields(
            {
                "vocab_size": lambda: integer(values, "vocab_size"),
                "hidden_size": hidden_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": num_heads,
                "num_key_value_heads": lambda: integer(values, "num_key_value_heads", num_heads()),
                "head_dim": lambda: integer(values, "head_dim", hidden_size() // num_heads()),
                "intermediate_size": lambda: integer(values, "intermediate_size"),
                "intermediate_size_mlp": lambda: integer(values, "intermediate_size_mlp"),
                "num_local_experts": lambda: integer(values, "num_local_experts"),
                "num_experts_per_tok": lambda: integer(values, "num_experts_per_tok", 1),
                "moe_layers": lambda: _moe_layers(values, num_layers()),
                "no_rope_layers": no_rope,
                "chunked_layers": lambda: _chunked_layers(values, no_rope()),
                "attention_chunk_size": lambda: _chunk_size(values),
                "use_qk_norm": lambda: flag(values, "use_qk_norm", True),
                "temperature": lambda: read_temperature(values),
                "rope": lambda: read_rope(values, default_theta=500000.0),
                "max_position_embeddings": lambda: integer(
                    values, "max_position_embeddings", least=2
                ),
                "rms_norm_eps": lambda: number(values, "rms_norm_eps", 1e-5),
                "attention_bias": lambda: flag(values, "attention_bias", False),
                "tie_word_embeddings": lambda: flag(values, "tie_word_embeddings", False),
                "bos_token_id": lambda: next(iter(integers(values, "bos_token_id")), None),
                "eos_token_ids": lambda: integers(values, "eos_token_id"),
            }
        )
        config = cls(**fields)
        config._check()
        return config

    def attention(self, layer: int) -> AttentionSpec:
        """The attention of decoder layer `layer`."""
        uses_rope = bool(self.no_rope_layers[layer])
        return AttentionSpec(
            input_size=self.hidden_size,
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            bias=self.attention_bias,
            rotary_layout="interleaved" if uses_rope else None,
            qk_norm_eps=self.rms_norm_eps if uses_rope and self.use_qk_norm else None,
            temperature=None if uses_rope else self.temperature,
            chunk_size=self.attention_chunk_size if self.chunked_layers[layer] else None,
        )

    def _check(self) -> None:
        check_heads(self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        if self.num_experts_per_tok > self.num_local_experts:
            raise CheckpointError(
                f"config key 'num_experts_per_tok': {self.num_experts_per_tok} is more than "
                f"num_local_experts {self.num_local_experts}"
            )
        outside = [i for i in self.eos_token_ids if not 0 <= i < self.vocab_size]
        if outside:
            raise CheckpointError(
                f"eos_token_id: {outside} outside the vocabulary 0..{self.vocab_size - 1}"
            )


def is_multimodal(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a Llama 4 with a vision tower."""
    return MULTIMODAL in strings(values, "architectures") and "vision_config" in values


def _text_part(values: Mapping[str, Any]) -> Mapping[str, Any]:
    architectures = strings(values, "architectures")
    model_type = values.get("model_type")
    if model_type not in ("llama4", "llama4_text") and not set(architectures) & set(ARCHITECTURES):
        raise CheckpointError(
            f"config.json: architectures {list(architectures)} (model_type {model_type!r}) "
            f"is not a Llama 4; supported are {', '.join(ARCHITECTURES)}"
        )
    text = values.get("text_config", values)
    if not isinstance(text, dict):
        raise CheckpointError(f"config key 'text_config': must be an object, got {text!r}")
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"config key 'hidden_act': only 'silu' exists in Llama 4, got {text['hidden_act']!r}"
        )
    return text


def _moe_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    layers = integers(values, "moe_layers")
    if values.get("moe_layers") is None:
        step = integer(values, "interleave_moe_layer_step", 1)
        return tuple(range(step - 1, num_layers, step))
    if len(set(layers)) != len(layers) or not set(layers) <= set(range(num_layers)):
        raise CheckpointError(
            f"config key 'moe_layers': must be distinct layers 0..{num_layers - 1}, got {layers}"
        )
    return layers


def _no_rope_layers(values: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    entries = integers(values, "no_rope_layers")
    if not entries:
        interval = integer(values, "no_rope_layer_interval", 4)
        return tuple(int((layer + 1) % interval != 0) for layer in range(num_layers))
    if len(entries) != num_layers or set(entries) - {0, 1}:
        raise CheckpointError(
            f"config key 'no_rope_layers': must be {num_layers} entries of 0 or 1, got {entries}"
        )
    return entries


def _chunked_layers(values: Mapping[str, Any], no_rope: tuple[int, ...]) -> tuple[bool, ...]:
    kinds = strings(values, "layer_types")
    if not kinds:
        return tuple(bool(entry) for entry in no_rope)
    known = {"chunked_attention", "full_attention"}
    if len(kinds) != len(no_rope) or set(kinds) - known:
        raise CheckpointError(
            f"config key 'layer_types': must be {len(no_rope)} of {sorted(known)}, got {kinds}"
        )
    return tuple(kind == "chunked_attention" for kind in kinds)


def _chunk_size(values: Mapping[str, Any]) -> int | None:
    """An explicit null means no chunks; an absent key means Llama 4's 8192."""
    if values.get("attention_chunk_size", 0) is None:
        return None
    return integer(values, "attention_chunk_size", 8192)
