"""Which class reads a draft checkpoint: ours, or what a user registered for its architecture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aerie.eagle3.architectures import (
    LayerKind,
    architecture,
    known_architectures,
    registered,
)
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.formats import flatten
from aerie.eagle3.interface import Target
from aerie.eagle3.reading import AS_WRITTEN, Reading
from aerie.kernels.backend import Backend
from aerie.llama4.checkpoint import Progress
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import read_json


@dataclass(frozen=True)
class Resolution:
    """What reads a draft: the class by `architecture`, its layer by `reason`."""

    architecture: str
    draft_class: type[Eagle3Llama4ForCausalLM]
    layer_kind: LayerKind
    reason: str


def register(name: str, draft_class: type[Eagle3Llama4ForCausalLM]) -> None:
    """Reads configs that name the architecture with `draft_class`, a subclass of our own."""
    if name in known_architectures():
        raise ValueError(f"architecture: {name!r} is registered already")
    registered[name] = draft_class


def resolve(values: Mapping[str, Any]) -> Resolution:
    """From a parsed `config.json`. Raises CheckpointError listing the known names."""
    found = architecture(flatten(values))
    draft_class = registered.get(found.name, Eagle3Llama4ForCausalLM)
    return Resolution(found.name, draft_class, found.layer_kind, found.reason)


def load_draft(
    path: str | Path,
    target: Target,
    backend: Backend | None = None,
    reading: Reading = AS_WRITTEN,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Eagle3Llama4ForCausalLM:
    """Loads a draft of any known architecture and format for `target`.

    `path` is a folder or a hub id, which `revision` pins; `reading` overrides what its files say;
    `progress` is told bytes read and bytes in all. Raises CheckpointError
    listing all that is wrong.
    """
    folder = resolve_folder(path, revision)
    draft_class = resolve(read_json(folder / "config.json")).draft_class
    return draft_class.from_pretrained(folder, target, backend, reading, progress=progress)
