"""The three layouts in which Eagle3 drafts are published, as one flat set of config keys.

    raw          SafeAI/EAGLE and SpecForge: a flat Llama-like JSON; `eagle_config` may hold tap ids
    speculators  `speculators_model_type`; the layer's keys are in `transformer_layer_config`
    ModelOpt     flat, with `eagle_config` and the export's own flags in it

EAGLE-3.1 is no layout of its own: its flags (`fc_norm`, `norm_output`) occur in all of them.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aerie.eagle3.reading import Decision
from aerie.llama4.json_fields import CheckpointError, section, strings

Format = Literal["raw", "speculators", "ModelOpt"]

LAYER_KEY = "transformer_layer_config"
TRAINED, CONVERTED = "Eagle3DraftModel", "Eagle3Speculator"  # how the library names its two kinds
SPECULATORS_KEYS = (
    "architectures",
    "draft_vocab_size",
    "target_hidden_size",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "eagle_aux_hidden_state_layer_ids",
    "quantization_config",
)
# ModelOpt's and TensorRT-LLM's flags, and the values that mean the published EAGLE-3 layer
MODELOPT_FLAGS: dict[str, object] = {
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
    "eh_proj_before_attn": False,
    "eh_proj_bias": False,
    "return_hidden_post_norm": False,
}


@dataclass(frozen=True)
class FlatConfig:
    """A draft's config keys in one object, and where they came from."""

    format: Format
    producer: str
    values: Mapping[str, Any]
    decisions: tuple[Decision, ...] = ()

    @property
    def nested(self) -> Mapping[str, Any]:
        """`eagle_config`, empty if absent."""
        return section(self.values, "eagle_config")

    def get(self, key: str) -> Any:
        """The value at the top level, else in `eagle_config`, else None."""
        value = self.values.get(key)
        return self.nested.get(key) if value is None else value


def flatten(values: Mapping[str, Any]) -> FlatConfig:
    """Recognises the layout. Raises CheckpointError for one that is not EAGLE-3."""
    if "speculators_model_type" in values or LAYER_KEY in values:
        return _speculators(values)
    nested = section(values, "eagle_config")
    if nested.keys() & {*MODELOPT_FLAGS, "has_lm_head"}:
        return FlatConfig("ModelOpt", "NVIDIA ModelOpt", values)
    return FlatConfig("raw", "SafeAI/EAGLE or SpecForge", values)


def _speculators(values: Mapping[str, Any]) -> FlatConfig:
    kind = values.get("speculators_model_type")
    if kind != "eagle3":
        raise CheckpointError(
            f"config key 'speculators_model_type': supported is 'eagle3', got {kind!r}"
        )
    if not section(values, LAYER_KEY):
        raise CheckpointError(f"config key {LAYER_KEY!r}: missing; it describes the draft's layer")
    own = {key: values[key] for key in SPECULATORS_KEYS if values.get(key) is not None}
    decisions: tuple[Decision, ...] = ()
    if "norm_before_residual" not in own:
        own["norm_before_residual"] = True
        decisions += (_absent_residual_flag(),)
    is_trained = TRAINED in strings(values, "architectures")
    origin = "trained by it" if is_trained else "converted by it from another format"
    flat = {**section(values, LAYER_KEY), **own}
    return FlatConfig("speculators", f"speculators, {origin}", flat, decisions)


def _absent_residual_flag() -> Decision:
    return Decision(
        "norm_before_residual",
        "true",
        "the file does not say; readers of this format disagree, vLLM's takes true",
        logging.WARNING,
    )
