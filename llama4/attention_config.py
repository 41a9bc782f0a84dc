"""What one attention layer does, and the config keys that say so; shared by target and draft."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from aerie.kernels.rope import Layout
from aerie.kernels.rotation import Llama3Scaling, inverse_frequencies
from aerie.llama4.json_fields import CheckpointError, flag, integer, number, section
from aerie.llama4.yarn import YarnScaling, read_yarn, yarn_frequencies


@dataclass(frozen=True)
class RopeConfig:
    """Base frequency and optional scaling: of llama3, or of YaRN in drafts."""

    theta: float
    scaling: Llama3Scaling | None
    yarn: YarnScaling | None = None

    @property
    def score_factor(self) -> float:
        """What scores are multiplied by beside 1 / sqrt(head_dim)."""
        return 1.0 if self.yarn is None else self.yarn.score_factor

    def frequencies(self, head_dim: int) -> Tensor:
        """Of every rotary pair, [J]."""
        if self.yarn is not None:
            return yarn_frequencies(head_dim, self.theta, self.yarn)
        return inverse_frequencies(head_dim, self.theta, self.scaling)


@dataclass(frozen=True)
class Temperature:
    """NoPE query scale: 1 + scale * ln(1 + floor((position + 1) / floor_scale))."""

    floor_scale: float
    scale: float


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer: what it projects, rotates, normalises and may see."""

    input_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    rotary_layout: Layout | None  # None: NoPE
    qk_norm_eps: float | None  # None: queries and keys are not normalised
    temperature: Temperature | None
    chunk_size: int | None  # None: all earlier positions are visible
    score_factor: float = 1.0  # beside 1 / sqrt(head_dim)


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Query heads must be a multiple of key/value heads, and a head have an even dimension."""
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"config key 'num_attention_heads': {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    if head_dim % 2 or not 2 <= head_dim <= 256:
        raise CheckpointError(f"config key 'head_dim': must be even and <= 256, got {head_dim}")


def read_rope(
    values: Mapping[str, Any], default_theta: float, *, may_be_yarn: bool = False
) -> RopeConfig:
    """RoPE from `rope_parameters`, or from top-level `rope_theta` and `rope_scaling`."""
    nested = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise CheckpointError(f"config key 'rope_parameters': must be an object, got {nested!r}")
    theta = number(nested if "rope_theta" in nested else values, "rope_theta", default_theta)
    if nested and not nested.keys() & {"rope_theta", "rope_type", "type"}:
        raise CheckpointError(f"config key 'rope_parameters': one flat section, got {nested}")
    for part in (values, nested):
        _check_whole_heads(part)
    _check_one_scaling(values)
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta, None)
    if kind == "yarn" and may_be_yarn:
        if theta <= 1:  # its formula divides by the logarithm
            raise CheckpointError(f"config key 'rope_theta': must exceed 1 for YaRN, got {theta:g}")
        return RopeConfig(theta, None, read_yarn(nested))
    if kind != "llama3":
        kinds = "'default', 'llama3'" + (", 'yarn'" if may_be_yarn else "")
        raise CheckpointError(f"config key 'rope_type': supported are {kinds}; got {kind!r}")
    scaling = Llama3Scaling(
        factor=number(nested, "factor"),
        low_freq_factor=number(nested, "low_freq_factor"),
        high_freq_factor=number(nested, "high_freq_factor"),
        original_max_position_embeddings=integer(nested, "original_max_position_embeddings"),
    )
    if scaling.low_freq_factor > scaling.high_freq_factor:
        raise CheckpointError(
            f"config key 'low_freq_factor': {scaling.low_freq_factor} must not exceed "
            f"high_freq_factor {scaling.high_freq_factor}"
        )
    return RopeConfig(theta, scaling)


def _check_one_scaling(values: Mapping[str, Any]) -> None:
    """Of two sections transformers 5.23 takes `rope_scaling`, and `read_rope` the other: without a
    word, a model would be read with another scaling than its trainer's."""
    sections = [section(values, key) for key in ("rope_parameters", "rope_scaling")]
    new, old = (_without_theta(part) for part in sections)
    if all(sections) and new != old:
        raise CheckpointError(
            f"config keys 'rope_parameters' and 'rope_scaling': must say the same where both are "
            f"there, got {new!r:.200} and {old!r:.200}; remove the one that was not trained with"
        )


def _without_theta(part: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of a section; "type" is the older name of its "rope_type"."""
    names = {"type": "rope_type"}
    return {names.get(key, key): value for key, value in part.items() if key != "rope_theta"}


def _check_whole_heads(values: Mapping[str, Any]) -> None:
    """vLLM turns the first part of every head, transformers' Llama and SpecForge all of it."""
    share = number(values, "partial_rotary_factor", 1.0)
    if share != 1.0:
        raise CheckpointError(
            f"config key 'partial_rotary_factor': only whole heads are turned here, got {share:g}; "
            f"remove it from a file whose trainer did the same (transformers' Llama, SpecForge)"
        )


def read_temperature(values: Mapping[str, Any]) -> Temperature | None:
    """The NoPE layers' attention temperature, or None where the file switches it off."""
    if not flag(values, "attn_temperature_tuning", True):
        return None
    return Temperature(number(values, "floor_scale", 8192), number(values, "attn_scale", 0.1))
