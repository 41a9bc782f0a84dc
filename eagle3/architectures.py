"""Names of draft architectures in configs, and the layer that each means.

Two public names per layer kind stand for one class: `LlamaForCausalLMEagle3` is what SpecForge and
ModelOpt write, `Eagle3LlamaForCausalLM` what vLLM's registry makes of the same model. The wiring is
one; whether the layer inside is Llama's or Llama 4's is said by the checkpoint's own `model_type`,
and by the name only where the config has none.
"""

from dataclasses import dataclass
from typing import Literal

from aerie.eagle3.formats import CONVERTED, TRAINED, FlatConfig
from aerie.llama4.json_fields import CheckpointError, strings

LayerKind = Literal["llama", "llama4"]

# name in a config -> the layer kind it stands for where model_type is silent
ARCHITECTURES: dict[str, LayerKind] = {
    "Eagle3Llama4ForCausalLM": "llama4",
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
    CONVERTED: "llama",
    TRAINED: "llama",
    "Llama4ForCausalLM": "llama4",  # an engine puts "Eagle3" in front of these two
    "LlamaForCausalLM": "llama",
}
MODEL_TYPES: dict[str, LayerKind] = {
    "llama": "llama",
    "llama4": "llama4",
    "llama4_text": "llama4",
}
EAGLE3_KEYS = ("draft_vocab_size", "eagle_config")  # no plain Llama and no EAGLE-1 draft has them
registered: dict[str, type] = {}  # by users, through `registry.register`


@dataclass(frozen=True)
class Architecture:
    """The name of a config that is known, and its layer by `reason`."""

    name: str
    layer_kind: LayerKind
    reason: str


def known_architectures() -> tuple[str, ...]:
    """Every name that a draft's config may have."""
    return (*ARCHITECTURES, *registered)


def architecture(flat: FlatConfig) -> Architecture:
    """From a config's flat keys. Raises CheckpointError listing the known names."""
    names = strings(flat.values, "architectures")
    known = [name for name in names if name in known_architectures() and _is_eagle3(name, flat)]
    if not known:
        raise CheckpointError(
            f"config key 'architectures': {list(names)} is no known Eagle3 draft; "
            f"supported are {', '.join(known_architectures())} (the last two of the built-in names "
            f"only beside one of {', '.join(EAGLE3_KEYS)}); others: aerie.eagle3.registry.register"
        )
    kind, reason = _layer_kind(known[0], flat)
    return Architecture(known[0], kind, reason)


def _is_eagle3(name: str, flat: FlatConfig) -> bool:
    return "Eagle3" in name or name in registered or any(map(flat.values.get, EAGLE3_KEYS))


def _layer_kind(architecture: str, flat: FlatConfig) -> tuple[LayerKind, str]:
    model_type = flat.values.get("model_type")
    if isinstance(model_type, str) and model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type], f"model_type {model_type!r}"
    if model_type is not None:
        raise CheckpointError(
            f"config key 'model_type': {model_type!r} layers are not implemented; supported are "
            f"{', '.join(MODEL_TYPES)}"
        )
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"config key 'model_type': missing, and {architecture!r} is no built-in name that "
            f"would say it; supported are {', '.join(MODEL_TYPES)}"
        )
    return ARCHITECTURES[architecture], f"the name {architecture}; model_type is absent"
