"""What a folder holds, or why it cannot be told: headers, indexes, links, files of other kinds.

safetensors' own reader is the reference: whatever it refuses is refused here, and whatever is read
here has the values it reads. What it accepts though it is ambiguous is refused on top.
"""

import json
import os
import random

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from aerie.llama4.checkpoint import read_tensors
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.safetensors_header import read_header

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int8)}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "I8", "shape": [4], "data_offsets": [24, 28]}


def write_header(folder, header: str | dict, data: int = 28) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def rejection(folder) -> str:
    with pytest.raises(CheckpointError) as error:
        read_tensors(folder, lambda name: name)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_reads_what_safetensors_writes(tmp_path):
    dtypes = (torch.bool, torch.int64, torch.bfloat16, torch.float8_e4m3fn, torch.float64)
    tensors = {str(dtype): torch.tensor([[1, 0], [1, 1]]).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    found = read_tensors(tmp_path, lambda name: name)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())


HEADERS = {
    "key twice": (f'{{"a": {json.dumps(A)}, "a": {json.dumps(B)}}}', "'a' appears twice"),
    "field twice": ('{"b": {"dtype": "I8", "dtype": "U8"}}', "'dtype' appears twice"),
    "list": ("[1]", "must be an object"),
    "not JSON": ("{", "header:"),
    "nested": ("[" * 100_000, "header:"),
    "unknown dtype": ({"a": A | {"dtype": "F7"}, "b": B}, "unknown dtype 'F7'"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, "must have dtype, shape"),
    "wrong size": ({"a": A | {"shape": [2, 4]}, "b": B}, "does not fill the bytes"),
    "overflow": ({"a": A | {"shape": [2**62, 2**62]}, "b": B}, "does not fill the bytes"),
    "negative": ({"a": A | {"shape": [-2, -3]}, "b": B}, "non-negative integers"),
    "fraction": ({"a": A | {"shape": [2.0, 3]}, "b": B}, "non-negative integers"),
    "backwards": ({"a": A | {"data_offsets": [24, 0]}, "b": B}, "does not fill the bytes"),
    "overlap": ({"a": A, "b": B | {"data_offsets": [20, 24]}}, "overlaps"),
    "hole": ({"a": A, "b": B | {"data_offsets": [25, 29]}}, "leaves a hole"),
    "too short": ({"a": A}, "end at byte"),
    "notes": ({"__metadata__": {"format": 1}, "a": A, "b": B}, "must map names to strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_rejects_header(case, tmp_path):
    header, expected = HEADERS[case]
    write_header(tmp_path, header)
    message = rejection(tmp_path)
    assert f"{FILE}: not a readable safetensors file (header: " in message
    assert expected in message


def test_header_that_announces_more_than_there_is(tmp_path):
    (tmp_path / FILE).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "10 bytes do not hold the header they announce" in rejection(tmp_path)


def test_any_spoilt_byte_is_reported_or_read_as_safetensors_reads_it(tmp_path):
    """A thousand single mutations: ours is never more permissive, and never reads other values."""
    save_file(TENSORS, tmp_path / FILE, metadata={"format": "pt"})
    whole = (tmp_path / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    chance = random.Random(0)
    refused = 0
    for _ in range(1000):
        at, byte = chance.randrange(header), chance.choice(b'{}[]":,0123456789abB\x00\xff \n')
        spoilt = whole[:at] + bytes([byte]) + whole[at + 1 :]
        if chance.random() < 0.2:
            spoilt = spoilt[: chance.randrange(len(spoilt))]
        (tmp_path / FILE).write_bytes(spoilt)
        try:
            found = read_tensors(tmp_path, lambda name: name)
        except CheckpointError:
            refused += 1
            continue
        try:
            expected = load(spoilt)
        except SafetensorError as error:
            pytest.fail(f"{spoilt[:header]!r} was read, safetensors says {error}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert 500 < refused < 1000


def test_rejects_link_out_of_the_folder(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    folder.mkdir()
    save_file(TENSORS, outside / FILE)
    (folder / FILE).symlink_to(outside / FILE)
    assert f"a link to {outside / FILE}, outside its folder" in rejection(folder)


def test_follows_links_of_the_hub_cache_and_within_the_folder(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "0123")
    (snapshot / FILE).symlink_to("../../blobs/0123")
    assert read_tensors(snapshot, lambda name: name).keys() == TENSORS.keys()
    save_file(TENSORS, tmp_path / "here")
    (tmp_path / FILE).symlink_to("here")
    assert read_tensors(tmp_path, lambda name: name).keys() == TENSORS.keys()


def test_rejects_pipe(tmp_path):
    os.mkfifo(tmp_path / FILE)
    assert "not a regular file" in rejection(tmp_path)


def test_rejects_folder_of_pickles(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    message = rejection(tmp_path)
    assert "only pytorch_model.bin: loading a pickle runs code that it contains" in message


@pytest.mark.parametrize(
    ("held", "advice"),
    [
        ("model-Q4_K_M.gguf", "GGUF is not read; take the safetensors"),
        ("draft.safetensors", "a single file is model.safetensors, shards need"),
    ],
    ids=["GGUF", "another name"],
)
def test_says_what_the_folder_holds_instead(held, advice, tmp_path):
    (tmp_path / held).write_bytes(b"x")
    assert f"only {held}: " in rejection(tmp_path)
    assert advice in rejection(tmp_path)


def test_rejects_pickled_shard(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    assert "loading a pickle runs code" in rejection(tmp_path)


@pytest.mark.parametrize("name", ["a\x00.safetensors", "C:a.safetensors", "a\\b.safetensors"])
def test_rejects_name_that_means_another_file_elsewhere(name, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "is not a plain safetensors file name" in rejection(tmp_path)


def test_rejects_index_with_a_key_twice(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    assert "the key 'a' appears twice" in rejection(tmp_path)


def test_lists_every_unusable_file(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})
    )
    message = rejection(tmp_path)
    assert "a.safetensors: not a readable" in message
    assert "b.safetensors: not a readable" in message


def test_file_that_shrinks_after_its_header_was_read(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / FILE)

    def shrink(file):
        found = read_header(file)
        os.truncate(file, file.stat().st_size - 1)
        return found

    monkeypatch.setattr("aerie.llama4.stored_tensors.read_header", shrink)
    assert "became shorter while it was read" in rejection(tmp_path)
