"""A multimodal Llama 4's configuration: the text part, the vision tower, the ids of image tokens.

The tower is transformers' own (`llama4/vision.py`), so its part becomes transformers' own config,
made only of keys that are read and checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.llama4.configuration_llama4 import Llama4VisionConfig

from aerie.llama4.attention_config import read_rope
from aerie.llama4.config import MULTIMODAL, Llama4Config, is_multimodal
from aerie.llama4.json_fields import (
    CheckpointError,
    integer,
    number,
    read_config,
    read_fields,
    section,
)

# the tower is laid out, without memory, before the files are compared with it
MAX_SIDE, MAX_SIZE = 2**14, 2**20


@dataclass(frozen=True)
class MultimodalConfig:
    """`image_token_id` marks rows that image features replace; `boi` and `eoi` enclose an image."""

    text: Llama4Config
    vision: Llama4VisionConfig
    image_token_id: int
    boi_token_id: int
    eoi_token_id: int

    @classmethod
    def from_pretrained(cls, folder: Path) -> "MultimodalConfig":
        """Reads `config.json`. Raises CheckpointError, a line for each key that is wrong."""
        values = read_config(folder)
        if not is_multimodal(values):
            raise CheckpointError(
                f"{folder}: has no vision tower (config key 'vision_config', architecture "
                f"{MULTIMODAL}); load it with Llama4ForCausalLM, and give no images"
            )
        return cls(
            **read_fields(
                {
                    "text": lambda: Llama4Config.from_pretrained(folder),
                    "vision": lambda: _vision(section(values, "vision_config")),
                    "image_token_id": lambda: _token_id(values, "image_token", 200092),
                    "boi_token_id": lambda: _token_id(values, "boi_token", 200080),
                    "eoi_token_id": lambda: _token_id(values, "eoi_token", 200081),
                }
            )
        ).checked()

    @property
    def tokens_per_tile(self) -> int:
        """Placeholders of one tile: its patches, shuffled together by the pixel ratio."""
        side = int(self.image_size // self.patch_size * _ratio(self.vision))
        return side * side

    @property
    def image_size(self) -> int:
        """Pixels of a tile's side."""
        assert isinstance(self.vision.image_size, int)  # transformers' type is wider
        return self.vision.image_size

    @property
    def patch_size(self) -> int:
        assert isinstance(self.vision.patch_size, int)
        return self.vision.patch_size

    def checked(self) -> "MultimodalConfig":
        """Itself. Raises CheckpointError for ids outside of the vocabulary."""
        for key in ("image_token_id", "boi_token_id", "eoi_token_id"):
            if getattr(self, key) >= self.text.vocab_size:
                raise CheckpointError(
                    f"config key {key!r}: {getattr(self, key)} outside the vocabulary "
                    f"0..{self.text.vocab_size - 1}"
                )
        return self


def _token_id(values: Mapping[str, Any], name: str, default: int) -> int:
    """`<name>_index` as files have it, `<name>_id` as transformers calls it; equal if both are."""
    index, alias = f"{name}_index", f"{name}_id"
    found = {key: integer(values, key, least=0) for key in (index, alias) if key in values}
    if len(set(found.values())) > 1:
        raise CheckpointError(f"config keys {list(found)}: name one token, got {found}")
    return next(iter(found.values()), default)


def _vision(values: Mapping[str, Any]) -> Llama4VisionConfig:
    keys = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "vision_output_dim",
        "projector_input_dim",
        "projector_output_dim",
    )
    sizes = read_fields({key: lambda key=key: integer(values, key) for key in keys})
    activation = values.get("hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"config key 'hidden_act': the tower has 'gelu', got {activation!r}")
    config = Llama4VisionConfig(
        **sizes,
        num_channels=integer(values, "num_channels", 3),
        pixel_shuffle_ratio=number(values, "pixel_shuffle_ratio", 0.5),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": read_rope(values, default_theta=10000.0).theta,
        },
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]  (taken by a base class)
    )
    _check(config, sizes)
    return config


def _check(config: Llama4VisionConfig, sizes: Mapping[str, int]) -> None:
    """The rules that transformers' modules take for granted."""
    side, remainder = divmod(sizes["image_size"], sizes["patch_size"])
    shuffled = sizes["hidden_size"] / _ratio(config) ** 2
    rules = {
        "image_size: must be a multiple of patch_size": remainder == 0,
        "num_channels: images have 3": config.num_channels == 3,
        f"image_size: at most {MAX_SIDE}": sizes["image_size"] <= MAX_SIDE,
        f"sizes: at most {MAX_SIZE}": max(sizes.values()) <= MAX_SIZE,
        "num_attention_heads: must divide hidden_size, with heads of a multiple of 4": (
            sizes["hidden_size"] % (4 * sizes["num_attention_heads"]) == 0
        ),
        "pixel_shuffle_ratio: must be at most 1 and give whole sides": (
            _ratio(config) <= 1 and (side * _ratio(config)).is_integer()
        ),
        "intermediate_size: must be hidden_size / pixel_shuffle_ratio^2": (
            shuffled == sizes["intermediate_size"]
        ),
        "projector_input_dim, projector_output_dim, vision_output_dim: must be equal": (
            sizes["projector_input_dim"]
            == sizes["projector_output_dim"]
            == sizes["vision_output_dim"]
        ),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        listed = "\n  ".join(f"config key 'vision_config': {rule}" for rule in broken)
        raise CheckpointError(f"{listed}\n  got {config.pixel_shuffle_ratio=}, {dict(sizes)}")


def _ratio(config: Llama4VisionConfig) -> float:
    return float(config.pixel_shuffle_ratio)
