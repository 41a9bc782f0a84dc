"""The vision tower and projector: transformers' own modules, read by our strict loader.

Images are tiles of `image_size` pixels; each becomes `tokens_per_tile` features of the text
model's width. Weights keep the dtype they are stored in: never quantised, nor cast to the text
model's.
"""

from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import (
    Llama4MultiModalProjector,
    Llama4VisionModel,
    Llama4VisionRotaryEmbedding,
)

from aerie.llama4.accounting import READABLE
from aerie.llama4.checkpoint import LoadOptions, check_weights, load_weights
from aerie.llama4.multimodal_config import MultimodalConfig
from aerie.llama4.stored_tensors import stored_tensors

PREFIXES = ("vision_model.", "multi_modal_projector.")
TILES_PER_PASS = 16  # bounds activations; an image of Llama 4's processor has at most 17


class VisionTower(nn.Module):
    """Tiles in, projected features out."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__()
        self.vision_model = Llama4VisionModel(config.vision)
        self.multi_modal_projector = Llama4MultiModalProjector(
            SimpleNamespace(vision_config=config.vision, text_config=config.text)
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        config: MultimodalConfig,
        device: torch.device | str,
        check_finite: bool = True,
    ) -> "VisionTower":
        """Reads the tower onto `device`. Raises CheckpointError listing all that is wrong."""
        tower = cls.without_values(config)
        options = LoadOptions(stored_dtype(folder), device, check_finite=check_finite)
        load_weights(tower, folder, _own, options)
        tower.compute_rotations(config, device)
        return tower

    @classmethod
    def check(cls, folder: Path, config: MultimodalConfig) -> None:
        """Whether `from_pretrained` would find every tensor, told by the files' headers alone.

        Raises CheckpointError listing all that is wrong.
        """
        check_weights(cls.without_values(config), folder, _own)

    @classmethod
    def without_values(cls, config: MultimodalConfig) -> "VisionTower":
        """On the meta device, without its table of rotations, which is computed: only once the
        files are known to hold a tower of the size that the config claims."""
        with torch.device("meta"):
            tower = cls(config)
        tower.vision_model.set_submodule("rotary_embedding", nn.Identity())
        return tower

    def compute_rotations(self, config: MultimodalConfig, device: torch.device | str) -> None:
        """On the CPU, so that the table has the same bits wherever the tower runs."""
        table = Llama4VisionRotaryEmbedding(config.vision)
        self.vision_model.rotary_embedding = table.to(device)

    @property
    def dtype(self) -> torch.dtype:
        return self.multi_modal_projector.linear_1.weight.dtype

    def forward(self, pixel_values_NCHW: Tensor) -> Tensor:
        """Features [tiles, tokens per tile, D] of tiles [tiles, 3, image_size, image_size]."""
        weight = self.multi_modal_projector.linear_1.weight
        passes = pixel_values_NCHW.to(weight.device, weight.dtype).split(TILES_PER_PASS)
        return torch.cat([self._features(tiles) for tiles in passes])

    def _features(self, tiles_NCHW: Tensor) -> Tensor:
        seen = self.vision_model(tiles_NCHW, return_dict=True).last_hidden_state
        return self.multi_modal_projector(seen)


def _own(name: str) -> str | None:
    """The tower's tensors have their parameters' names; the text model's are read by its loader."""
    return name if name.startswith(PREFIXES) else None


def stored_dtype(folder: Path) -> torch.dtype:
    """The widest type among the tower's tensors; what cannot be read at all, loading refuses."""
    stored = {tensor.dtype for tensor in stored_tensors(folder) if _own(tensor.name)}
    readable = [dtype for dtype in READABLE if dtype in stored] or [torch.float32]
    return reduce(torch.promote_types, readable)
