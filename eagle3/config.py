"""The draft's configuration, read once from a raw (SafeAI / SpecForge) `config.json`.

Two layer kinds share one wiring. `llama`, which every public Llama 4 draft holds: rotate-half RoPE
and full causal attention. `llama4`, the layer of vLLM's "Eagle3 for Llama 4": interleaved RoPE with
optional QK norm, or NoPE. Neither chunks its attention, whatever the target does.

Tap ids here count inputs (id i = input of target layer i), see `SupportsEagle3`. Explicit ids in a
raw file name *outputs* (SpecForge's 1, N/2 - 1, N - 4), so they are read one higher.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aerie.llama4.attention_config import (
    AttentionSpec,
    RopeConfig,
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
    read_json,
    section,
    strings,
)

LLAMA = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
LLAMA4 = ("Llama4ForCausalLM", "Eagle3Llama4ForCausalLM")
NOT_NULL = ("yoco_global_kv_layer", "yoco_local_kv_layer")  # refused even if 0, a layer's number
UNSUPPORTED = ("sliding_window", "quantization_config", "parallel_drafting")
FEATURE_NORMS: dict[str, "FeatureNorm"] = {"norm_before_fc": "joint", "fc_norm": "per_tap"}
TAP_COUNT_KEYS = ("num_aux_hidden_states", "num_aux_layers", "aux_state_multiplier")
# what SpecForge's Llama 4 template, which has no such key, was trained with
DEFAULT_ROPE_THETA = 10000.0

FeatureNorm = Literal["none", "joint", "per_tap"]


@dataclass(frozen=True)
class Eagle3Config:
    """Everything the draft's modules are built from."""

    layer_kind: Literal["llama", "llama4"]
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    attention: AttentionSpec
    rope: RopeConfig
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    num_taps: int
    aux_hidden_state_layers: tuple[int, ...] | None  # None: the target's default
    norm_before_residual: bool
    feature_norm: FeatureNorm  # in front of fc: over the concatenation, or one norm per tap
    norm_output: bool  # the next level gets the normalised state
    logit_scale: float

    @classmethod
    def from_pretrained(cls, folder: Path, target_num_layers: int) -> "Eagle3Config":
        """Reads `folder/config.json`; the target's depth is where the draft's layer is numbered."""
        return cls.from_hf(read_json(folder / "config.json"), target_num_layers)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], target_num_layers: int) -> "Eagle3Config":
        """From the parsed JSON. Raises CheckpointError naming the key, its value and the rule."""
        kind = _layer_kind(values)
        _refuse_unsupported(values)
        hidden_size, vocab_size = integer(values, "hidden_size"), integer(values, "vocab_size")
        draft_vocab_size = integer(values, "draft_vocab_size", vocab_size)
        if draft_vocab_size > vocab_size:
            raise CheckpointError(
                f"config key 'draft_vocab_size': {draft_vocab_size} exceeds vocab_size {vocab_size}"
            )
        taps = _tap_layers(values)
        width_key = "intermediate_size_mlp" if kind == "llama4" else "intermediate_size"
        return cls(
            layer_kind=kind,
            hidden_size=hidden_size,
            target_hidden_size=integer(values, "target_hidden_size", hidden_size),
            intermediate_size=integer(values, width_key, values.get("intermediate_size")),
            attention=_attention(values, kind, target_num_layers),
            rope=read_rope(values, DEFAULT_ROPE_THETA),
            rms_norm_eps=number(values, "rms_norm_eps", 1e-5),
            vocab_size=vocab_size,
            draft_vocab_size=draft_vocab_size,
            num_taps=_num_taps(values, taps),
            aux_hidden_state_layers=taps,
            norm_before_residual=flag(values, "norm_before_residual", False),
            feature_norm=_feature_norm(values),
            norm_output=_flag(values, "norm_output"),
            logit_scale=number(values, "logit_scale", 1.0),
        )


def draft_no_rope_entry(entries: tuple[int, ...], target_num_layers: int) -> int:
    """1 (RoPE) or 0 (NoPE) for the draft's only layer, which is numbered after the target's last.

    The list may be absent or empty (RoPE), hold the draft's own entries, or be left-padded already
    by the target's layer count.
    """
    if not entries:
        return 1
    if len(entries) not in (1, target_num_layers + 1) or set(entries) - {0, 1}:
        raise CheckpointError(
            f"config key 'no_rope_layers': must be one entry of 0 or 1, or {target_num_layers + 1} "
            f"(padded by the target's layers), got {entries}"
        )
    return entries[-1]


def _layer_kind(values: Mapping[str, Any]) -> Literal["llama", "llama4"]:
    architectures = strings(values, "architectures")
    if set(architectures) & set(LLAMA4) or values.get("model_type") in ("llama4", "llama4_text"):
        return "llama4"
    if set(architectures) & set(LLAMA):
        return "llama"
    raise CheckpointError(
        f"config key 'architectures': {list(architectures)} is no known Eagle3 draft; "
        f"supported are {', '.join(LLAMA + LLAMA4)}"
    )


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    """Keys that change the mathematics and are not implemented must not be read over."""
    refused = [key for key in NOT_NULL if values.get(key) is not None]
    refused += [key for key in UNSUPPORTED if values.get(key)]
    nested = section(values, "eagle_config")
    for part in (values, nested):
        refused += [] if flag(part, "use_aux_hidden_state", True) else ["use_aux_hidden_state"]
    refused += ["norm_before_residual"] if flag(nested, "norm_before_residual", False) else []
    refused += ["layer_types"] if "sliding_attention" in strings(values, "layer_types") else []
    refused += ["hidden_act"] if values.get("hidden_act", "silu") != "silu" else []
    if refused:
        shown = {key: values.get(key, nested.get(key)) for key in refused}
        raise CheckpointError(f"config keys of a draft variant that is not supported: {shown}")
    if integer(values, "num_hidden_layers", 1) != 1:
        raise CheckpointError("config key 'num_hidden_layers': an Eagle3 draft has exactly 1 layer")


def _flag(values: Mapping[str, Any], key: str) -> bool:
    """At the top level or in `eagle_config`."""
    return flag(values, key, False) or flag(section(values, "eagle_config"), key, False)


def _feature_norm(values: Mapping[str, Any]) -> FeatureNorm:
    found = [key for key in FEATURE_NORMS if _flag(values, key)]
    if len(found) > 1:
        raise CheckpointError(f"config keys {found}: only one norm can stand in front of fc")
    if _flag(values, "norm_output") and found != ["fc_norm"]:
        raise CheckpointError(
            "config key 'norm_output': true is read only beside fc_norm (EAGLE-3.1). SpecForge "
            "wrote it for the norm in front of lm_head, which every draft has: set it to false"
        )
    return FEATURE_NORMS[found[0]] if found else "none"


def _attention(
    values: Mapping[str, Any], kind: Literal["llama", "llama4"], target_num_layers: int
) -> AttentionSpec:
    num_heads = integer(values, "num_attention_heads")
    num_kv_heads = integer(values, "num_key_value_heads", num_heads)
    hidden_size = integer(values, "hidden_size")
    head_dim = integer(values, "head_dim", hidden_size // num_heads)
    check_heads(num_heads, num_kv_heads, head_dim)
    is_llama4 = kind == "llama4"
    entries = integers(values, "no_rope_layers") if is_llama4 else ()
    uses_rope = bool(draft_no_rope_entry(entries, target_num_layers))
    has_qk_norm = is_llama4 and uses_rope and flag(values, "use_qk_norm", True)
    return AttentionSpec(
        input_size=2 * hidden_size,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        bias=flag(values, "attention_bias", False),
        rotary_layout=("interleaved" if is_llama4 else "half") if uses_rope else None,
        qk_norm_eps=number(values, "rms_norm_eps", 1e-5) if has_qk_norm else None,
        temperature=None if uses_rope else read_temperature(values),
        chunk_size=None,
    )


def _tap_layers(values: Mapping[str, Any]) -> tuple[int, ...] | None:
    nested = section(values, "eagle_config")
    key = "eagle_aux_hidden_state_layer_ids"
    outputs = integers(values, key) or integers(nested, key)
    return tuple(layer + 1 for layer in outputs) or None


def _num_taps(values: Mapping[str, Any], taps: tuple[int, ...] | None) -> int:
    default = len(taps) if taps else 3
    written = [integer(values, key) for key in TAP_COUNT_KEYS if values.get(key) is not None]
    count = written[0] if written else default
    if taps is not None and count != len(taps):
        raise CheckpointError(
            f"config key 'eagle_aux_hidden_state_layer_ids': {len(taps)} ids, but fc reads {count}"
        )
    return count
