"""An image as the tiles that Llama 4's vision tower reads.

The rules are those of transformers' `Llama4ImageProcessor`, bit for bit (`tests/test_images.py`).
That class itself needs torchvision, whose builds must match torch's and break transformers' import
where they do not; PyTorch and Pillow are enough here.

An image is shrunk as little as its grid of at most `max_tiles` tiles allows, never grown beyond a
tile, padded at the right and below, and cut; several tiles are followed by the whole image as one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from aerie.llama4.json_fields import CheckpointError, flag, integer, read_json, section

BILINEAR = 2  # as Pillow numbers its filters


@dataclass(frozen=True)
class Grid:
    """Rows and columns of tiles."""

    height: int
    width: int


@dataclass(frozen=True)
class Tiles:
    """`pixel_values` [tiles, 3, side, side] in bfloat16; `grid` without the tile of the whole."""

    pixel_values: Tensor
    grid: Grid


@dataclass(frozen=True)
class TileRule:
    """The keys of `preprocessor_config.json` (`max_patches` there) that change anything."""

    side: int
    max_tiles: int = 16
    fills_canvas: bool = False  # `resize_to_max_canvas`
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_pretrained(cls, folder: Path, side: int) -> "TileRule":
        """Reads the processor's files, if the folder has some, for a tower of tiles `side` wide.

        Raises CheckpointError for a value that this package would not honour.
        """
        values = _processor_values(folder)
        size = section(values, "size") or {"height": side, "width": side}
        if (size.get("height"), size.get("width")) != (side, side):
            raise CheckpointError(
                f"config key 'size': the tower's tiles are {side} x {side}, got {dict(size)}"
            )
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not flag(values, step, True):
                raise CheckpointError(f"config key {step!r}: must be true, got {values[step]!r}")
        if values.get("resample", BILINEAR) != BILINEAR:
            raise CheckpointError(
                f"config key 'resample': must be {BILINEAR} (bilinear), got {values['resample']!r}"
            )
        return cls(
            side,
            integer(values, "max_patches", 16),
            flag(values, "resize_to_max_canvas", False),
            _three(values, "image_mean"),
            _three(values, "image_std"),
        )

    def grid(self, height: int, width: int) -> Grid:
        """The smallest grid among those that shrink an image of this size least."""
        grids = [
            (rows, columns)
            for rows in range(1, self.max_tiles + 1)
            for columns in range(1, self.max_tiles // rows + 1)
        ]
        sizes = self.side * torch.tensor(grids)
        scales = (sizes / torch.tensor([height, width])).amin(1)  # float32, as in transformers
        growing = scales[scales >= 1]
        best = scales.max() if len(growing) == 0 or self.fills_canvas else growing.min()
        equal = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
        return Grid(*min(equal, key=lambda grid: grid[0] * grid[1]))

    def cut(self, image_CHW: Tensor) -> Tiles:
        """Tiles of a uint8 image [3, H, W]."""
        image_1CHW, (height, width) = image_CHW[None], image_CHW.shape[-2:]
        grid = self.grid(height, width)
        canvas = grid.height * self.side, grid.width * self.side
        fitted = self._resized(image_1CHW, *self._fitted_size(height, width, canvas))
        below, right = canvas[0] - fitted.shape[-2], canvas[1] - fitted.shape[-1]
        padded = self._normalised(pad(fitted, (0, right, 0, below)))[0]
        tiles = padded.unfold(1, self.side, self.side).unfold(2, self.side, self.side)
        pixels = tiles.permute(1, 2, 0, 3, 4).flatten(0, 1)
        if len(pixels) > 1:
            whole = self._normalised(self._resized(image_1CHW, self.side, self.side))
            pixels = torch.cat((pixels, whole))
        return Tiles(pixels.contiguous(), grid)

    def _fitted_size(self, height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
        """As large as the canvas allows without distortion, nor beyond a tile for growing."""
        if not self.fills_canvas:
            canvas = (
                min(max(height, self.side), canvas[0]),
                min(max(width, self.side), canvas[1]),
            )
        by_height, by_width = canvas[0] / height, canvas[1] / width
        if by_width < by_height:
            return max(min(int(height * by_width), canvas[0]), 1), canvas[1]
        return canvas[0], max(min(int(width * by_height), canvas[1]), 1)

    @staticmethod
    def _resized(image_NCHW: Tensor, height: int, width: int) -> Tensor:
        if image_NCHW.shape[-2:] == (height, width):
            return image_NCHW
        return interpolate(image_NCHW, (height, width), mode="bilinear", antialias=True)

    def _normalised(self, image_NCHW: Tensor) -> Tensor:
        """In bfloat16, as the tower was trained."""
        mean, std = (
            torch.tensor(v, dtype=torch.bfloat16)[:, None, None] for v in (self.mean, self.std)
        )
        return (image_NCHW.to(torch.bfloat16) * (1 / 255) - mean) / std


def _processor_values(folder: Path) -> Mapping[str, Any]:
    """Of `preprocessor_config.json`, or of its section in newer transformers' one file."""
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return section(read_json(folder / "processor_config.json"), "image_processor")
    return {}


def _three(values: Mapping[str, Any], key: str) -> tuple[float, ...]:
    found = values.get(key) or [0.5, 0.5, 0.5]
    is_list = isinstance(found, list) and len(found) == 3
    if not is_list or not all(type(x) in (int, float) and 0 < x < 10 for x in found):
        raise CheckpointError(f"config key {key!r}: must be three positive numbers, got {found!r}")
    return tuple(float(x) for x in found)
