"""A prompt as the target reads it: ids, with a placeholder for every image feature, and tiles.

transformers' `Llama4Processor` writes an image's placeholders and Llama 4's chat format; it is
given our tiles (`tiles.py`) and the checkpoint's tokenizer. Its template is the library's own: none
is taken from a checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

from aerie.llama4.config import Llama4Config, is_multimodal
from aerie.llama4.json_fields import CheckpointError, read_json

if TYPE_CHECKING:
    from aerie.llama4.multimodal_config import MultimodalConfig

IMAGE = "<|image|>"  # where an image goes in a text
CHAT_TOKENS = ("<|header_start|>", "<|header_end|>", "<|eot|>")


@dataclass(frozen=True)
class Asked:
    """A prompt as a user gives it: a text, and the files of its images."""

    text: str
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """`pixel_values` are the tiles of all images, None where there are none."""

    ids: list[int]
    pixel_values: Tensor | None = None


def prepare(
    text: str, tokenizer: Tokenizer, folder: Path, images: Sequence[Tensor] = (), chat: bool = False
) -> Prompt:
    """`text` with `images` (uint8 [3, H, W]) at its "<|image|>", in front of it if it has none.

    With `chat` it is a user's message, to be answered. Raises ValueError unless there are as many
    images as places, CheckpointError where the target takes no images or its tokenizer is not
    Llama 4's.
    """
    if not images and not chat:
        return Prompt(tokenizer.encode(text).ids)
    if images and not is_multimodal(read_json(folder / "config.json")):
        raise CheckpointError(f"--image: {folder} has no vision tower; give no images")
    places = text.count(IMAGE)
    if places == 0:
        text = IMAGE * len(images) + text
    elif places != len(images):
        raise ValueError(f"--image: the prompt has {places} {IMAGE}, {len(images)} images given")
    processor = _processor(tokenizer, folder)
    if chat:
        _check_tokens(tokenizer, dict.fromkeys(CHAT_TOKENS))
        messages = [{"role": "user", "content": text}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not images:
        return Prompt(tokenizer.encode(text, add_special_tokens=False).ids)
    from transformers.processing_utils import TextKwargs

    as_text = TextKwargs(add_special_tokens=not chat)  # the chat format begins with its own BOS
    encoded = processor(images=list(images), text=text, text_kwargs=as_text)
    return Prompt(list(encoded["input_ids"][0]), torch.as_tensor(encoded["pixel_values"]))


def _processor(tokenizer: Tokenizer, folder: Path):
    # seconds of import, for prompts with images or chats only
    from transformers import Llama4Processor, PreTrainedTokenizerFast
    from transformers.image_processing_base import ImageProcessingMixin

    values = read_json(folder / "config.json")
    bos = Llama4Config.from_hf(values).bos_token_id
    patch_size, ratio, rule = 14, 0.5, None
    if is_multimodal(values):
        from aerie.llama4.multimodal_config import MultimodalConfig
        from aerie.tiles import TileRule

        config = MultimodalConfig.from_pretrained(folder)
        _check_image_tokens(tokenizer, config)
        patch_size, ratio = config.patch_size, config.vision.pixel_shuffle_ratio
        rule = TileRule.from_pretrained(folder, config.image_size)

    class TileProcessor(ImageProcessingMixin):
        """What `Llama4Processor` asks of an image processor."""

        def __call__(self, images: Sequence[Tensor], **_: object) -> dict[str, object]:
            assert rule is not None
            cut = [rule.cut(image) for image in images]
            return {
                "pixel_values": torch.cat([tiles.pixel_values for tiles in cut]),
                "aspect_ratios": [(tiles.grid.height, tiles.grid.width) for tiles in cut],
            }

    return Llama4Processor(
        image_processor=TileProcessor(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=None if bos is None else tokenizer.id_to_token(bos),
        ),
        patch_size=patch_size,
        pixel_shuffle_ratio=ratio,
    )


def _check_image_tokens(tokenizer: Tokenizer, config: "MultimodalConfig") -> None:
    """The processor writes these by name; the config knows some by id."""
    named = {
        "<|patch|>": config.image_token_id,
        "<|image_start|>": config.boi_token_id,
        "<|image_end|>": config.eoi_token_id,
        IMAGE: None,
        "<|tile_x_separator|>": None,
        "<|tile_y_separator|>": None,
    }
    _check_tokens(tokenizer, named)


def _check_tokens(tokenizer: Tokenizer, named: dict[str, int | None]) -> None:
    wrong = [
        f"{name} is {found}" + ("" if wanted is None else f", the config says {wanted}")
        for name, wanted in named.items()
        if (found := tokenizer.token_to_id(name)) is None or found != (wanted or found)
    ]
    if wrong:
        raise CheckpointError(f"tokenizer.json: is not this Llama 4's: {'; '.join(wrong)}")
