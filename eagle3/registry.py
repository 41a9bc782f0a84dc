"""Which class reads a draft checkpoint, by the architecture its config names, and why.

Two public names per layer kind stand for one class: `LlamaForCausalLMEagle3` is what SpecForge and
ModelOpt write, `Eagle3LlamaForCausalLM` what vLLM's registry makes of the same model. The wiring is
one; whether the layer inside is Llama's or Llama 4's is said by the checkpoint's own `model_type`,
and by the name only where the config has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aerie.eagle3.formats import CONVERTED, TRAINED, FlatConfig, flatten
from aerie.eagle3.reading import AS_WRITTEN, Reading
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import CheckpointError, read_json, strings

if TYPE_CHECKING:
    from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
    from aerie.eagle3.interface import Target
    from aerie.kernels.backend import Backend
    from aerie.llama4.checkpoint import Progress

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
_registered: dict[str, "type[Eagle3Llama4ForCausalLM]"] = {}


@dataclass(frozen=True)
class Resolution:
    """What reads a draft: the class by `architecture`, its layer by `reason`."""

    architecture: str
    draft_class: "type[Eagle3Llama4ForCausalLM]"
    layer_kind: LayerKind
    reason: str


def register(architecture: str, draft_class: "type[Eagle3Llama4ForCausalLM]") -> None:
    """Reads configs that name `architecture` with `draft_class`, a subclass of our own."""
    if architecture in ARCHITECTURES or architecture in _registered:
        raise ValueError(f"architecture: {architecture!r} is registered already")
    _registered[architecture] = draft_class


def known_architectures() -> tuple[str, ...]:
    """Every name that `resolve` accepts."""
    return (*ARCHITECTURES, *_registered)


def resolve(values: Mapping[str, Any]) -> Resolution:
    """From a parsed `config.json`. Raises CheckpointError listing the known names."""
    return resolve_flat(flatten(values))


def resolve_flat(flat: FlatConfig) -> Resolution:
    """As `resolve`, from keys that are flat already."""
    from aerie.eagle3.draft import Eagle3Llama4ForCausalLM  # the draft's config resolves here

    names = strings(flat.values, "architectures")
    known = [name for name in names if name in known_architectures() and _is_eagle3(name, flat)]
    if not known:
        raise CheckpointError(
            f"config key 'architectures': {list(names)} is no known Eagle3 draft; "
            f"supported are {', '.join(known_architectures())} (the last two of the built-in names "
            f"only beside one of {', '.join(EAGLE3_KEYS)}); others: aerie.eagle3.registry.register"
        )
    draft_class = _registered.get(known[0], Eagle3Llama4ForCausalLM)
    kind, reason = _layer_kind(known[0], flat)
    return Resolution(known[0], draft_class, kind, reason)


def load_draft(
    path: str | Path,
    target: "Target",
    backend: "Backend | None" = None,
    reading: Reading = AS_WRITTEN,
    *,
    revision: str | None = None,
    progress: "Progress | None" = None,
) -> "Eagle3Llama4ForCausalLM":
    """Loads a draft of any known architecture and format for `target`.

    `path` is a folder or a hub id, which `revision` pins; `reading` overrides what its files say;
    `progress` is told bytes read and bytes in all. Raises CheckpointError
    listing all that is wrong.
    """
    folder = resolve_folder(path, revision)
    draft_class = resolve(read_json(folder / "config.json")).draft_class
    return draft_class.from_pretrained(folder, target, backend, reading, progress=progress)


def _is_eagle3(name: str, flat: FlatConfig) -> bool:
    return "Eagle3" in name or name in _registered or any(map(flat.values.get, EAGLE3_KEYS))


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
