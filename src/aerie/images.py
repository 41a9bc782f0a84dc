"""Images from files, opened as untrusted input: sizes are looked at before anything is decoded."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6  # decoded: 192 MB


def read_image(path: Path) -> Tensor:
    """The uint8 image [3, H, W], upright, on white where it is transparent.

    Raises ValueError naming the file for what is no image, is damaged or too large, and where
    Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("--image: needs Pillow; pip install 'aerie[images]'") from error
    if not path.is_file():
        raise ValueError(f"--image: {path}: no such file")
    if not 0 < (nbytes := path.stat().st_size) <= MAX_FILE_BYTES:
        raise ValueError(f"--image: {path}: must be 1..{MAX_FILE_BYTES} bytes, has {nbytes}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked here
            with Image.open(path, formats=FORMATS) as image:
                return _decoded(image)
    except Exception as error:  # Pillow raises many unrelated types for damaged files
        raise ValueError(
            f"--image: {path}: not a readable image of {', '.join(FORMATS)} ({error})"
        ) from error


def _decoded(image) -> Tensor:
    from PIL import Image, ImageOps

    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")
    image = ImageOps.exif_transpose(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    rows = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return rows.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
