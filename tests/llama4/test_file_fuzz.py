"""Headers and shard indexes made of anything that JSON can say: read as they are meant, or refused.

A header is judged by safetensors' own reader, than which ours is never more permissive; an index by
the shards it names, with which it must agree in every name.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from aerie.llama4.checkpoint import read_tensors
from aerie.llama4.json_fields import CheckpointError
from tests.llama4.test_stored_tensors import FILE, INDEX

DTYPES = ("F32", "BF16", "F8_E4M3", "I64", "BOOL", "U8", "F4", "F7", "", "f32")
SMALL = st.integers(-2, 6)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(["a", "b", "__metadata__", "", "../x", "a\x00", "ü"])
KEYS = ("dtype", "shape", "data_offsets")
DATA = 24


@st.composite
def entries(draw) -> Any:
    """A tensor of the right form; its size is mostly right, and one of its keys may be anything."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(SMALL, max_size=3))
    start = draw(st.sampled_from([0, 0, 4, 8, 12]))
    size = draw(st.sampled_from([0, 1, 4, 8, 12, 24]))
    entry: dict[str, Any] = dict(zip(KEYS, (dtype, shape, [start, start + size]), strict=True))
    if draw(st.integers(0, 4)) == 0:
        entry[draw(st.sampled_from([*KEYS, "more"]))] = draw(ANYTHING)
    return entry


@st.composite
def headers(draw) -> bytes:
    """Mostly whole files of one to three tensors, some of them spoilt."""
    if draw(st.integers(0, 9)) == 0:
        return json.dumps(draw(ANYTHING)).encode("utf-8", "surrogatepass")
    sizes, header, start = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)), {}, 0
    for number, size in enumerate(sizes):
        end = DATA if number == len(sizes) - 1 else min(DATA, start + 4 * size)
        header[f"t{number}"] = dict(
            zip(KEYS, ("F32", [(end - start) // 4], [start, end]), strict=True)
        )
        start = end
    for _ in range(draw(st.integers(0, 2))):
        header[draw(NAMES)] = draw(st.one_of(entries(), ANYTHING))
    return json.dumps(header).encode("utf-8", "surrogatepass")


@given(
    header=headers(),
    padding=st.sampled_from([b"", b" ", b"\n  ", b"\x00"]),
    size=st.sampled_from([DATA, DATA, DATA, DATA - 1, DATA + 1, 0]),
)
@settings(max_examples=300, deadline=None)
def test_a_header_is_read_as_safetensors_reads_it_or_refused(
    header, padding, size, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("header", numbered=True)
    header += padding
    whole = len(header).to_bytes(8, "little") + header + bytes(range(size))
    (folder / FILE).write_bytes(whole)
    try:
        found, complaint = read_tensors(folder, lambda name: name), ""
    except CheckpointError as error:
        found, complaint = None, str(error)
    if found is None:
        assert str(folder) in complaint
        return
    try:
        expected = load(whole)
    except SafetensorError as error:
        pytest.fail(f"{header!r} was read, safetensors says {error}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


SHARDS = {"one.safetensors": {"a": 1.0, "b": 2.0}, "two.safetensors": {"c": 3.0}}
RIGHT = {name: file for file, held in SHARDS.items() for name in held}
STRAY = ("three.safetensors", "one.bin", "../one.safetensors", "/one.safetensors", "", ".", "x/")
FILES = st.sampled_from([*SHARDS, *STRAY])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for file, held in SHARDS.items():
        save_file({name: torch.tensor(value) for name, value in held.items()}, folder / file)
    return folder


@st.composite
def indexes(draw) -> Any:
    """The right index with some entries changed, or anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ANYTHING)
    weight_map: dict[str, Any] = dict(RIGHT)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["a", "b", "c", "d", "", "../a"]))
        match draw(st.sampled_from(["lost", "file", "anything"])):
            case "lost":
                weight_map.pop(name, None)
            case "file":
                weight_map[name] = draw(FILES)
            case "anything":
                weight_map[name] = draw(ANYTHING)
    index: dict[str, Any] = {"metadata": draw(ANYTHING), "weight_map": weight_map}
    if draw(st.integers(0, 9)) == 0:
        index[draw(st.sampled_from(["metadata", "weight_map", "more"]))] = draw(ANYTHING)
    return index


def _held(index: Any) -> dict[str, float] | None:
    """What an index that agrees with the shards it names leads to; a shard may be left out."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        return None
    files = [file for file in weight_map.values() if isinstance(file, str) and file in SHARDS]
    listed = {name: (file, value) for file in files for name, value in SHARDS[file].items()}
    if weight_map != {name: file for name, (file, _) in listed.items()}:
        return None
    return {name: value for name, (_, value) in listed.items()}


@given(index=indexes())
@settings(max_examples=200, deadline=None)
def test_an_index_agrees_with_its_shards_or_is_refused(index, shards):
    (shards / INDEX).write_text(json.dumps(index), encoding="utf-8", errors="surrogatepass")
    held = _held(index)
    try:
        found, complaint = read_tensors(shards, lambda name: name), ""
    except CheckpointError as error:
        found, complaint = None, str(error)
    assert (held is None) == (found is None)
    if found is None:
        assert str(shards) in complaint
    else:
        assert {name: tensor.item() for name, tensor in found.items()} == held
