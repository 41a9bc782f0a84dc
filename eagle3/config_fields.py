"""Every field of a draft's config, each read by a function of its own.

So one report can list all that is wrong with a file, and the reasons of every choice are at hand.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aerie.eagle3.architectures import Architecture, LayerKind, architecture
from aerie.eagle3.conventions import (
    TAP_KEY,
    Taps,
    either,
    read_norm_before_residual,
    read_norm_output,
    read_taps,
    rope_decisions,
    rotary_layout,
    yarn_decisions,
)
from aerie.eagle3.formats import FlatConfig
from aerie.eagle3.reading import AS_WRITTEN, Decision, Reading
from aerie.eagle3.supported import attention_window, check_supported
from aerie.llama4.attention_config import (
    AttentionSpec,
    RopeConfig,
    check_heads,
    read_rope,
    read_temperature,
)
from aerie.llama4.json_fields import CheckpointError, flag, integer, integers, number

FEATURE_NORMS: dict[str, "FeatureNorm"] = {"norm_before_fc": "joint", "fc_norm": "per_tap"}
TAP_COUNT_KEYS = ("num_aux_hidden_states", "num_aux_layers", "aux_state_multiplier")
# what SpecForge's Llama 4 template, which has no such key, was trained with
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_EPS: dict[LayerKind, float] = {"llama": 1e-6, "llama4": 1e-5}  # transformers' own

FeatureNorm = Literal["none", "joint", "per_tap"]


@dataclass(frozen=True)
class ConfigFields:
    """Reads the fields one by one, so that all complaints can be listed together."""

    flat: FlatConfig
    target_num_layers: int
    reading: Reading

    def readers(self) -> Mapping[str, Callable[[], Any]]:
        """A function for every field of `Eagle3Config` that comes from the file."""
        values, flat, reading = self.flat.values, self.flat, self.reading
        return {
            "supported": lambda: check_supported(flat),
            "layer_kind": lambda: self.kind,
            "hidden_size": lambda: integer(values, "hidden_size"),
            "target_hidden_size": lambda: integer(
                values, "target_hidden_size", integer(values, "hidden_size")
            ),
            "intermediate_size": self.intermediate_size,
            "attention": self.attention,
            "rope": lambda: self.rope,
            "rms_norm_eps": lambda: self.eps,
            "vocab_size": lambda: integer(values, "vocab_size"),
            "draft_vocab_size": self.draft_vocab_size,
            "num_taps": self.num_taps,
            "aux_hidden_state_layers": lambda: self.taps.inputs,
            "tap_convention": lambda: self.taps.convention,
            "norm_before_residual": lambda: read_norm_before_residual(flat, reading),
            "feature_norm": self.feature_norm,
            "norm_output": lambda: read_norm_output(flat, reading).value,
            "logit_scale": lambda: number(values, "logit_scale", 1.0),
            "attention_window": lambda: attention_window(flat),
            "trained_positions": self.trained_positions,
            "shares_target_head": self.shares_target_head,
            "ties_own_head": lambda: flag(values, "tie_word_embeddings", False),
            "decisions": self.decisions,
        }

    @property
    def architecture(self) -> Architecture:
        return architecture(self.flat)

    @property
    def kind(self) -> LayerKind:
        return self.architecture.layer_kind

    @property
    def taps(self) -> Taps:
        return read_taps(self.flat, self.reading, self.target_num_layers)

    @property
    def rope(self) -> RopeConfig:
        written = read_rope(self.flat.values, DEFAULT_ROPE_THETA, may_be_yarn=True)
        return RopeConfig(written.theta, None) if self.reading.rope_scaling == "none" else written

    @property
    def eps(self) -> float:
        return number(self.flat.values, "rms_norm_eps", DEFAULT_EPS[self.kind])

    def intermediate_size(self) -> int:
        key = "intermediate_size_mlp" if self.kind == "llama4" else "intermediate_size"
        return integer(self.flat.values, key, self.flat.values.get("intermediate_size"))

    def draft_vocab_size(self) -> int:
        vocab_size = integer(self.flat.values, "vocab_size")
        size = integer(self.flat.values, "draft_vocab_size", vocab_size)
        if size > vocab_size:
            raise CheckpointError(
                f"config key 'draft_vocab_size': {size} exceeds vocab_size {vocab_size}"
            )
        return size

    def num_taps(self) -> int:
        values, taps = self.flat.values, self.taps.inputs
        default = len(taps) if taps else 3
        written = [integer(values, key) for key in TAP_COUNT_KEYS if values.get(key) is not None]
        count = written[0] if written else default
        if taps is not None and count != len(taps):
            raise CheckpointError(f"config key '{TAP_KEY}': {len(taps)} ids, but fc reads {count}")
        return count

    def feature_norm(self) -> FeatureNorm:
        found = [key for key in FEATURE_NORMS if either(self.flat, key)]
        if len(found) > 1:
            raise CheckpointError(f"config keys {found}: only one norm can stand in front of fc")
        return FEATURE_NORMS[found[0]] if found else "none"

    def trained_positions(self) -> int | None:
        values = self.flat.values
        if values.get("max_position_embeddings") is None:
            return None
        return integer(values, "max_position_embeddings")

    def shares_target_head(self) -> bool:
        if self.reading.lm_head is not None:
            return self.reading.lm_head == "target"
        return not flag(self.flat.nested, "has_lm_head", True)

    def attention(self) -> AttentionSpec:
        values, is_llama4 = self.flat.values, self.kind == "llama4"
        num_heads = integer(values, "num_attention_heads")
        num_kv_heads = integer(values, "num_key_value_heads", num_heads)
        hidden_size = integer(values, "hidden_size")
        head_dim = integer(values, "head_dim", hidden_size // num_heads)
        check_heads(num_heads, num_kv_heads, head_dim)
        entries = integers(values, "no_rope_layers") if is_llama4 else ()
        uses_rope = bool(draft_no_rope_entry(entries, self.target_num_layers))
        has_qk_norm = is_llama4 and uses_rope and flag(values, "use_qk_norm", True)
        return AttentionSpec(
            input_size=2 * hidden_size,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=flag(values, "attention_bias", False),
            rotary_layout=rotary_layout(is_llama4, self.reading) if uses_rope else None,
            qk_norm_eps=self.eps if has_qk_norm else None,
            temperature=None if uses_rope else read_temperature(values),
            chunk_size=None,
            # normalised queries and keys lose what cosines and sines were multiplied by
            score_factor=self.rope.score_factor if uses_rope and not has_qk_norm else 1.0,
        )

    def decisions(self) -> tuple[Decision, ...]:
        """Every choice that the file left open, for the log and for `aerie inspect`."""
        flat, named = self.flat, self.architecture
        found = [
            Decision("format", flat.format, f"as written by {flat.producer}"),
            Decision("layer kind", named.layer_kind, named.reason),
            self.taps.decision,
            *flat.decisions,
            *read_norm_output(flat, self.reading).decisions,
        ]
        attention = self.attention()
        if attention.rotary_layout is not None:
            found += rope_decisions(flat, self.rope.theta)
            found += yarn_decisions(flat, self.rope.yarn, attention.score_factor)
        if flat.values.get("rms_norm_eps") is None:
            reason = "the config names none; transformers' own for this layer kind"
            found.append(Decision("rms_norm_eps", f"{self.eps:g}", reason, logging.INFO))
        if self.reading != AS_WRITTEN:
            overrides = ", ".join(f"{k} = {v}" for k, v in self.reading.as_dict().items())
            found.append(Decision("overrides", overrides, "asked for", logging.INFO))
        return tuple(found)


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
