"""Image files, tiles, prompts and `aerie generate --image`, on a random tiny checkpoint.

Regimes: images smaller and larger than a tile, thin, square, at and past the edges of a grid; all
modes and formats; prompts with places for images and without, chats; damaged and huge files, none
of which may reach the model.
"""

import json
import struct
import zlib

import pytest
import torch
from typer.testing import CliRunner

from aerie.assets.tiny_multimodal.checkpoint import TOKENS, VISION, new_model, randomise, save
from aerie.cli import app
from aerie.images import MAX_FILE_BYTES, read_image
from aerie.llama4.json_fields import CheckpointError
from aerie.prompting import prepare
from aerie.text import load_tokenizer
from aerie.tiles import Grid, TileRule

Image = pytest.importorskip("PIL.Image", reason="images need Pillow (the extra aerie[images])")

SIDE = VISION["image_size"]
IMAGE = TOKENS.index("<|patch|>")
# (height, width): grids of transformers 5.23's Llama4ImageProcessor, 16 tiles of 16 pixels at most
GRIDS = {
    (16, 16): (1, 1), (1, 1): (1, 1), (8, 30): (1, 2), (17, 16): (2, 1), (16, 17): (1, 2),
    (33, 33): (3, 3), (40, 20): (3, 2), (100, 10): (7, 1), (10, 100): (1, 7), (1000, 3): (16, 1),
    (64, 64): (4, 4), (65, 64): (4, 4), (200, 300): (3, 5), (48, 80): (3, 5), (90, 31): (6, 2),
    (31, 90): (2, 6), (500, 500): (4, 4),
}  # fmt: skip
FILLING = {
    (16, 16): (4, 4), (1, 1): (4, 4), (8, 30): (2, 8), (17, 16): (4, 4), (40, 20): (5, 3),
    (100, 10): (10, 1), (1000, 3): (16, 1), (200, 300): (3, 5), (90, 31): (6, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = new_model().eval()
    randomise(model)
    return save(model, tmp_path_factory.mktemp("multimodal"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def picture(tmp_path):
    """`picture(width=16, height=16, mode="RGB", colour="red", name="a.png")`: a file."""

    def make(width=SIDE, height=SIDE, mode="RGB", colour="red", name="a.png"):
        Image.new(mode, (width, height), colour).save(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize(("fills", "known"), [(False, GRIDS), (True, FILLING)])
def test_grids_are_those_of_transformers(fills, known):
    rule = TileRule(16, 16, fills)
    assert {size: rule.grid(*size) for size in known} == {s: Grid(*g) for s, g in known.items()}


@pytest.mark.parametrize(("side", "max_tiles", "fills"), [(16, 4, False), (16, 16, True)])
def test_tiles_equal_those_of_transformers(side, max_tiles, fills):
    pytest.importorskip("torchvision", reason="transformers' own image processor needs it")
    from transformers import Llama4ImageProcessor

    theirs = Llama4ImageProcessor(
        size={"height": side, "width": side}, max_patches=max_tiles, resize_to_max_canvas=fills
    )
    rule = TileRule(side, max_tiles, fills)
    for height, width in GRIDS:
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        expected = theirs([image], return_tensors="pt", input_data_format="channels_first")
        tiles = rule.cut(image)
        assert torch.equal(tiles.pixel_values, expected["pixel_values"])
        assert [tiles.grid.height, tiles.grid.width] == expected["aspect_ratios"][0].tolist()


def test_tiles_are_cut_in_reading_order_and_the_whole_comes_last():
    left, right = torch.full((3, 16, 16), 255), torch.zeros(3, 16, 16)
    image = torch.cat((left, right), 2).to(torch.uint8)
    tiles = TileRule(16).cut(image)
    assert tiles.grid == Grid(1, 2)
    assert tiles.pixel_values.shape == (3, 3, 16, 16)
    assert (tiles.pixel_values[0] == 1).all()
    assert (tiles.pixel_values[1] == -1).all()
    whole = tiles.pixel_values[2, 0, 0]
    assert (whole[:6] == 1).all()
    assert (whole[-6:] == -1).all()


def test_images_are_padded_with_black():
    tiles = TileRule(16, 4).cut(torch.full((3, 8, 32), 255, dtype=torch.uint8))
    assert tiles.grid == Grid(1, 2)
    assert (tiles.pixel_values[:2, :, :8] == 1).all()
    assert (tiles.pixel_values[:2, :, 8:] == -1).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": {"height": 32, "width": 32}}, "'size': the tower's tiles are 16 x 16"),
        ({"max_patches": 0}, "'max_patches': must be an integer >= 1"),
        ({"do_resize": False}, "'do_resize': must be true"),
        ({"resample": 3}, "'resample': must be 2"),
        ({"image_mean": [0.5]}, "'image_mean': must be three positive numbers"),
    ],
    ids=str,
)
def test_processor_files_that_would_not_be_honoured_are_refused(values, expected, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=expected):
        TileRule.from_pretrained(tmp_path, 16)


def test_newer_processor_file(tmp_path):
    values = {"image_processor": {"max_patches": 3, "image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    assert TileRule.from_pretrained(tmp_path, 16) == TileRule(16, 3, mean=(0.1, 0.2, 0.3))
    (tmp_path / "processor_config.json").unlink()
    assert TileRule.from_pretrained(tmp_path, 16) == TileRule(16, 16)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"])
def test_formats(name, picture):
    image = read_image(picture(5, 3, name=name))
    assert image.shape == (3, 3, 5)
    assert image.dtype == torch.uint8
    assert image[0].min() > 240
    assert image[1:].max() < 15


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 7, [7, 7, 7]),
        ("RGBA", (255, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("LA", (0, 0), [255, 255, 255]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_modes_become_rgb_on_white(mode, colour, expected, picture):
    assert read_image(picture(2, 2, mode, colour))[:, 0, 0].tolist() == expected


def test_images_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 2)


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises this size and that holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(100)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def spoilt(picture, kind: str):
    file = picture(200, 200)
    data = file.read_bytes()
    match kind:
        case "truncated":
            file.write_bytes(data[: len(data) // 2])
        case "no image":
            file.write_bytes(b"GIF89a is how one begins")
        case "empty":
            file.write_bytes(b"")
        case "bomb":
            file.write_bytes(png(100_000, 100_000))
        case "many pixels":
            file.write_bytes(png(9000, 9000))
        case "zero size":
            file.write_bytes(png(0, 5))
        case "huge file":
            with file.open("wb") as handle:
                handle.truncate(MAX_FILE_BYTES + 1)
        case "missing":
            file.unlink()
        case "other format":
            Image.new("RGB", (4, 4)).save(file, format="TIFF")
    return file


SPOILT = {
    "truncated": "not a readable image",
    "no image": "not a readable image",
    "empty": "must be 1..67108864 bytes, has 0",
    "bomb": "10000000000 pixels",
    "many pixels": "9000 x 9000 pixels, at most 64000000 are decoded",
    "zero size": "not a readable image",
    "huge file": "must be 1..67108864 bytes, has 67108865",
    "missing": "no such file",
    "other format": "not a readable image of PNG, JPEG",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_files_are_refused_by_name(kind, picture):
    file = spoilt(picture, kind)
    with pytest.raises(ValueError, match=SPOILT[kind]) as caught:
        read_image(file)
    assert str(file) in str(caught.value)


def read(tokenizer, prompt) -> str:
    return tokenizer.decode(prompt.ids, skip_special_tokens=False)


ONE = "<|image_start|><|image|>" + "<|patch|>" * 4 + "<|image_end|>"


def plain_image(height=16, width=16):
    return torch.zeros(3, height, width, dtype=torch.uint8)


def test_images_stand_where_the_prompt_says_or_before_it(folder, tokenizer):
    given = prepare("a<|image|>b", tokenizer, folder, [plain_image()])
    assert read(tokenizer, given) == f"<|begin|>a{ONE}b"
    before = prepare("ab", tokenizer, folder, [plain_image(), plain_image()])
    assert read(tokenizer, before) == f"<|begin|>{ONE}{ONE}ab"
    assert before.pixel_values is not None
    assert before.pixel_values.shape == (2, 3, 16, 16)
    without = prepare("ab", tokenizer, folder)
    assert read(tokenizer, without) == "<|begin|>ab"
    assert without.pixel_values is None


def test_tiles_have_separators(folder, tokenizer):
    prompt = prepare("a", tokenizer, folder, [plain_image(32, 32)])
    tile = "<|patch|>" * 4
    row = f"{tile}<|tile_x_separator|>{tile}<|tile_y_separator|>"
    image = f"<|image_start|>{row}{row}<|image|>{tile}<|image_end|>"
    assert read(tokenizer, prompt) == f"<|begin|>{image}a"
    assert prompt.pixel_values is not None
    assert prompt.pixel_values.shape == (5, 3, 16, 16)
    assert prompt.ids.count(IMAGE) == 20


@pytest.mark.parametrize("images", [0, 1])
def test_chats_have_llama_4s_format(images, folder, tokenizer):
    prompt = prepare("hi", tokenizer, folder, [plain_image()] * images, chat=True)
    start, end, answer = "<|header_start|>", "<|header_end|>\n\n", "assistant"
    expected = f"<|begin|>{start}user{end}{ONE * images}hi<|eot|>{start}{answer}{end}"
    assert read(tokenizer, prompt) == expected


def generate(folder, *arguments):
    options = ("--model", str(folder), "--device", "cpu", "--max-new-tokens", "6", "--json")
    return CliRunner().invoke(app, ["generate", *options, *map(str, arguments)])


def test_command_line_decodes_images(folder, picture):
    red, blue = picture(), picture(40, 20, colour="blue", name="b.png")
    found = {}
    for name, images in {"red": [red], "blue": [blue], "both": [red, blue]}.items():
        options = [part for image in images for part in ("--image", image)]
        result = generate(folder, "--prompt", "hello", "--check", *options)
        assert result.exit_code == 0, result.output
        printed = json.loads(result.stdout)
        assert printed["identical"]
        found[name] = printed["token_ids"]
    assert len({tuple(ids) for ids in found.values()}) == 3
    lazy = generate(folder, "--prompt", "hello", "--image", red, "--lazy-vision")
    assert json.loads(lazy.stdout)["token_ids"] == found["red"]
    chat = generate(folder, "--prompt", "hello", "--image", red, "--chat")
    assert json.loads(chat.stdout)["token_ids"] != found["red"]


def test_command_line_decodes_a_list_with_images_and_without(folder, picture, tmp_path):
    red, blue = picture(), picture(40, 20, colour="blue", name="b.png")
    entries = [
        {"prompt": "hello", "images": [str(red)]},
        "hello",
        {"prompt": "hello", "images": [str(blue)]},
    ]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    result = generate(folder, "--prompt-file", tmp_path / "list.json", "--check")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    alone = [generate(folder, "--prompt", "hello", *p) for p in (["--image", red], [])]
    expected = [json.loads(one.stdout)["token_ids"] for one in alone]
    assert [one["token_ids"] for one in printed[:2]] == expected
    assert printed[2]["token_ids"] != printed[0]["token_ids"]
    assert all(one["identical"] for one in printed)
    (tmp_path / "list.json").write_text('["a", {"prompt": "a", "image": "a.png"}]')
    refused = generate(folder, "--prompt-file", tmp_path / "list.json")
    assert refused.exit_code == 2
    assert 'an entry is a text or {"prompt": text' in refused.stderr


@pytest.mark.parametrize(
    ("prompt", "images", "expected"),
    [
        ("a<|image|>b<|image|>", 1, "the prompt has 2 <|image|>, 1 images given"),
        ("a<|image|>", 2, "the prompt has 1 <|image|>, 2 images given"),
        ("a<|patch|>", 0, f"1 placeholders (id {IMAGE}) in the prompt, but 0 tiles of 4"),
        ("a<|patch|>", 1, f"5 placeholders (id {IMAGE}) in the prompt, but 1 tiles of 4"),
    ],
)
def test_command_line_counts_images(prompt, images, expected, folder, picture):
    result = generate(folder, "--prompt", prompt, *["--image", picture()] * images)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert result.stdout == ""


def test_command_line_refuses_before_it_loads(folder, picture, monkeypatch):
    monkeypatch.setattr("aerie.loading.load_target", None)
    result = generate(folder, "--prompt", "a", "--image", spoilt(picture, "truncated"))
    assert result.exit_code == 2
    assert "not a readable image" in result.stderr
    embedded = CliRunner().invoke(app, ["generate", "--prompt", "a", "--image", str(picture())])
    assert embedded.exit_code == 2
    assert "has no vision tower; give no images" in embedded.stderr
    chat = CliRunner().invoke(app, ["generate", "--prompt", "a", "--chat"])
    assert chat.exit_code == 2
    assert "tokenizer.json: is not this Llama 4's: <|header_start|> is None" in chat.stderr


def test_a_missing_pillow_is_named(picture, monkeypatch):
    file = picture()
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ValueError, match=r"needs Pillow; pip install 'aerie\[images\]'"):
        read_image(file)
