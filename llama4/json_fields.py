"""Typed reading of a checkpoint's JSON: every wrong field is one sentence that names it.

Config classes read each field once through these functions; nothing downstream asks the JSON again.
A config is data: no value in it makes this package import, run or fetch anything.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 16 * 2**20
MAX_INTEGER = 2**31 - 1
LARGEST = {  # of what something is built or listed one by one, before any file has confirmed it
    "num_hidden_layers": 1000,
    "num_local_experts": 4096,
    "vocab_size": 2**24,
    "draft_vocab_size": 2**24,
    "num_aux_hidden_states": 8,  # taps, under three names
    "num_aux_layers": 8,
    "aux_state_multiplier": 8,
}

logger = logging.getLogger("aerie.llama4")


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded as what it claims to be."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CheckpointError if it is absent, malformed or not an object."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint folder must contain {path.name}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not a model config")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; what it says of code to import is ignored, with a word."""
    values = read_json(folder / "config.json")
    if "auto_map" in values:
        _say_ignored(folder / "config.json")
    return values


@lru_cache(maxsize=256)
def _say_ignored(file: Path) -> None:
    """Once for each file."""
    logger.warning("%s: auto_map is ignored: nothing in a checkpoint is ever imported", file)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: of two equal keys Python keeps the last, another reader the first."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise CheckpointError(f"the key {key!r:.200} appears twice")
        values[key] = value
    return values


def integer(values: Mapping[str, Any], key: str, default: int | None = None, least: int = 1) -> int:
    """The integer under `key`, at least `least` and of a size that tensors can have."""
    value = _get(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CheckpointError(f"config key {key!r}: must be an integer >= {least}, got {value!r}")
    if value > (most := LARGEST.get(key, MAX_INTEGER)):
        raise CheckpointError(f"config key {key!r}: must be at most {most}, got {value!r}")
    return value


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The positive finite number under `key`."""
    value = _get(values, key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < sys.float_info.max:  # false for NaN, too
        raise CheckpointError(f"config key {key!r}: must be a positive number, got {value!r}")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """The boolean under `key`; older Llama 4 files write some flags as integers."""
    value = _get(values, key, default)
    if not isinstance(value, (bool, int)):
        raise CheckpointError(f"config key {key!r}: must be true or false, got {value!r}")
    return bool(value)


def integers(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The list of integers under `key`; absent, null and a bare integer are read as a list too."""
    value = values.get(key)
    items = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise CheckpointError(f"config key {key!r}: must be a list of integers, got {value!r}")
    return tuple(items)


def strings(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The list of strings under `key`; absent, null and a bare string are read as a list too."""
    value = values.get(key)
    items = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(item, str) for item in items):
        raise CheckpointError(f"config key {key!r}: must be a list of strings, got {value!r}")
    return tuple(items)


def section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under `key`, empty if absent or null."""
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"config key {key!r}: must be an object, got {value!r}")
    return value or {}


def read_fields(readers: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What all readers return. Raises one CheckpointError with a line for each that complains."""
    fields: dict[str, Any] = {}
    problems: dict[str, None] = {}  # several fields may need the same wrong key
    for name, reader in readers.items():
        try:
            fields[name] = reader()
        except CheckpointError as error:
            problems |= dict.fromkeys(str(error).split("\n  "))
    if problems:
        raise CheckpointError("\n  ".join(problems))
    return fields


def _get(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    if value is not None:
        return value
    if default is None:
        raise CheckpointError(f"config key {key!r}: missing")
    return default
