"""The multimodal target against transformers' own, float32, on random tiny checkpoints.

Regimes: text alone, one image, several images, several tiles of one image; images at the start, at
the end, across a chunk edge of the attention and across the edge of a prefill pass; the Triton
backend; a tower in its own dtype, read late; files with something missing or left over.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from aerie.assets.tiny_multimodal.checkpoint import TOKENS, VISION, new_model, randomise, save
from aerie.eagle3.interface import SupportsEagle3
from aerie.inspection import inspect
from aerie.llama4.conditional_generation import Llama4ForConditionalGeneration
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM

TOLERANCE = 1e-5  # as in tests/llama4/test_model.py
CHUNK = 16
IMAGE = TOKENS.index("<|patch|>")
TILE = [IMAGE] * 4
TEXT = list(range(40, 52))
PROMPTS = {
    "text": TEXT,
    "one image": [*TEXT[:3], *TILE, *TEXT[3:]],
    "several images": [*TEXT[:2], *TILE, *TEXT[2:7], *TILE, *TEXT[7:9], *TILE, *TEXT[9:]],
    "several tiles": [*TEXT[:2], *TILE, 9, *TILE, 10, *TILE, *TEXT[2:]],
    "at the start": [*TILE, *TEXT],
    "at the end": [*TEXT, *TILE],
    "across a chunk edge": [*TEXT, 9, 10, *TILE, *TEXT],
    "nothing but images": [*TILE, *TILE],
}


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = new_model(attention_chunk_size=CHUNK).eval().requires_grad_(False)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return save(theirs, tmp_path_factory.mktemp("multimodal"))


@pytest.fixture(scope="module")
def ours(folder):
    return Llama4ForConditionalGeneration.from_pretrained(folder)


def features_of(model, prompt, pixel_values) -> torch.Tensor:
    images = model.image_features(prompt, pixel_values)
    assert images is not None
    return images.rows_FD


def tiles_of(prompt) -> torch.Tensor:
    side = VISION["image_size"]
    return torch.randn(prompt.count(IMAGE) // 4, 3, side, side)


def their_logits(theirs, prompt, pixel_values):
    pixel_values = pixel_values if len(pixel_values) else None
    return theirs(torch.tensor(prompt)[None], pixel_values=pixel_values).logits[0]


def our_logits(ours, prompt, images, *steps):
    """Logits of all rows, in causal steps of the given sizes."""
    cache, logits, start = ours.allocate_cache(len(prompt), page_size=8), [], 0
    for ids in torch.tensor(prompt).split(list(steps or [len(prompt)])):
        embeds = ours.get_input_embeddings(ids)
        if images is not None:
            embeds = images.over(embeds, start)
        logits.append(ours(ids, cache.causal_step(len(ids)), None, embeds).logits_TV)
        cache.commit(0, range(len(ids)))
        start += len(ids)
    return torch.cat(logits)


@pytest.mark.parametrize("case", PROMPTS)
def test_logits_match_transformers(case, theirs, ours, assert_close):
    prompt = PROMPTS[case]
    pixel_values = tiles_of(prompt)
    expected = their_logits(theirs, prompt, pixel_values)
    images = ours.image_features(prompt, pixel_values)
    assert_close(our_logits(ours, prompt, images), expected, TOLERANCE)
    if images is not None:
        features = ours.get_multimodal_embeddings(pixel_values)
        merged = ours.get_input_embeddings(torch.tensor(prompt), features)
        assert torch.equal(merged, images.over(ours.get_input_embeddings(torch.tensor(prompt)), 0))


@pytest.mark.parametrize("case", ["across a chunk edge", "several tiles"])
def test_images_split_between_steps(case, theirs, ours, assert_close):
    prompt = PROMPTS[case]
    pixel_values = tiles_of(prompt)
    expected = their_logits(theirs, prompt, pixel_values)
    images = ours.image_features(prompt, pixel_values)
    for size in (1, 3, 15, 17):
        steps = [min(size, len(prompt) - start) for start in range(0, len(prompt), size)]
        assert_close(our_logits(ours, prompt, images, *steps), expected, TOLERANCE)


def test_other_pixels_give_other_logits(ours):
    """Or the tests above would show nothing."""
    prompt = PROMPTS["one image"]
    first, second = (our_logits(ours, prompt, ours.image_features(prompt, tiles_of(prompt)))
                     for _ in range(2))  # fmt: skip
    assert torch.equal(first[:3], second[:3])
    assert (first[3:] - second[3:]).abs().amin(0).max() > 0.1


def test_triton_backend_matches_transformers(theirs, folder, assert_close):
    model = Llama4ForConditionalGeneration.from_pretrained(folder, backend="triton")
    prompt = PROMPTS["one image"]
    pixel_values = tiles_of(prompt)
    images = model.image_features(prompt, pixel_values)
    expected = their_logits(theirs, prompt, pixel_values)
    assert_close(our_logits(model, prompt, images), expected, TOLERANCE)


def test_the_text_part_loads_alone(folder, ours):
    alone = Llama4ForCausalLM.from_pretrained(folder)
    ids = torch.tensor(TEXT)
    logits = alone(ids, alone.allocate_cache(12).causal_step(12)).logits_TV
    assert torch.equal(logits, our_logits(ours, TEXT, None))


def test_supports_eagle3_through_the_language_model(ours):
    target: SupportsEagle3 = ours  # read by the type checker, with all signatures
    assert isinstance(target, SupportsEagle3)
    assert isinstance(ours.get_language_model(), Llama4ForCausalLM)
    assert ours.get_eagle3_aux_hidden_state_layers() == (2, 4, 5)
    ours.set_aux_hidden_state_layers((1, 2))
    ids = torch.tensor(TEXT)
    taps = ours(ids, ours.allocate_cache(12).causal_step(12)).aux_hidden_states
    ours.set_aux_hidden_state_layers(())
    assert [tap.shape for tap in taps] == [(12, 64), (12, 64)]


@pytest.mark.parametrize("tiles", [0, 1, 3])
def test_wrong_numbers_of_tiles_name_both_numbers(tiles, ours):
    with pytest.raises(ValueError, match=rf"8 placeholders .* {tiles} tiles of 4 .* {4 * tiles};"):
        ours.image_features([*TILE, *TEXT, *TILE], torch.zeros(tiles, 3, 16, 16))
    with pytest.raises(ValueError, match=r"8 placeholders .* 4 image features"):
        ours.get_input_embeddings(torch.tensor([*TILE, *TILE]), torch.zeros(4, 64))


def test_wrong_tile_sizes_are_refused(ours):
    with pytest.raises(ValueError, match=r"pixel_values: must be \[tiles, 3, 16, 16\]"):
        ours.image_features(TILE, torch.zeros(1, 3, 20, 20))


def rewritten(folder, tmp_path, change, **config_changes):
    """The checkpoint with other tensors or config keys."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    vision = values["vision_config"] | config_changes.pop("vision", {})
    values |= config_changes | {"vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def drop(name):
    return lambda tensors: tensors.pop(name)


LINEAR = "multi_modal_projector.linear_1.weight"
FLAWS = {
    "missing": (drop(LINEAR), f"{LINEAR}: missing"),
    "shape": (
        lambda t: t.update({LINEAR: t[LINEAR].mT.contiguous()}),
        f"{LINEAR}: shape \\(48, 64\\), expected \\(64, 48\\).*it looks transposed",
    ),
    "left over": (
        lambda t: t.update({"vision_model.extra": t[LINEAR].clone()}),
        "vision_model.extra: unexpected",
    ),
    "fp8": (
        lambda t: t.update({LINEAR: t[LINEAR].to(torch.float8_e4m3fn)}),
        f"{LINEAR}: torch.float8_e4m3fn, expected float16, bfloat16 or float32",
    ),
    "outside of all parts": (
        lambda t: t.update({"audio_model.extra": t[LINEAR].clone()}),
        "audio_model.extra: unexpected",
    ),
}


@pytest.mark.parametrize("lazy", [False, True], ids=["at once", "lazy"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_flaws_of_the_tower_are_found_at_load(flaw, lazy, folder, tmp_path):
    change, expected = FLAWS[flaw]
    path = rewritten(folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=expected):
        Llama4ForConditionalGeneration.from_pretrained(path, lazy_vision=lazy)


def test_values_of_a_lazy_tower_are_checked_when_it_is_read(folder, tmp_path):
    path = rewritten(folder, tmp_path, lambda t: t[LINEAR].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=f"{LINEAR}: not finite"):
        Llama4ForConditionalGeneration.from_pretrained(path)
    model = Llama4ForConditionalGeneration.from_pretrained(path, lazy_vision=True)
    with pytest.raises(CheckpointError, match=f"{LINEAR}: not finite"):
        model.image_features(TILE, torch.zeros(1, 3, 16, 16))
    assert not model.has_read_vision


def test_a_lazy_tower_is_read_at_the_first_image(folder, ours):
    model = Llama4ForConditionalGeneration.from_pretrained(folder, lazy_vision=True)
    our_logits(model, TEXT, model.image_features(TEXT, torch.zeros(0, 3, 16, 16)))
    assert not model.has_read_vision
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in ours.parameters())
    pixel_values = tiles_of(TILE)
    features = features_of(model, TILE, pixel_values)
    assert model.has_read_vision
    assert torch.equal(features, features_of(ours, TILE, pixel_values))


def test_the_tower_keeps_its_own_dtype(folder, tmp_path):
    def halve(tensors):
        for name, tensor in tensors.items():
            if name.startswith(("vision_model.", "multi_modal_projector.")):
                tensors[name] = tensor.bfloat16()

    path = rewritten(folder, tmp_path, halve)
    model = Llama4ForConditionalGeneration.from_pretrained(path, quantize="fp8")
    assert {p.dtype for p in model.vision.parameters()} == {torch.bfloat16}
    assert model.get_language_model().dtype == torch.float32
    assert features_of(model, TILE, tiles_of(TILE)).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_token_index": 9999}, "'image_token_id': 9999 outside the vocabulary"),
        ({"image_token_id": 3}, r"\['image_token_index', 'image_token_id'\]: name one token"),
        ({"boi_token_index": -1}, "'boi_token_index': must be an integer >= 0"),
        ({"vision": {"image_size": 18}}, "image_size: must be a multiple of patch_size"),
        ({"vision": {"hidden_size": None}}, "'hidden_size': missing"),
        ({"vision": {"num_hidden_layers": 2**30}}, "'num_hidden_layers': must be at most 1000"),
        ({"vision": {"image_size": 2**30}}, "image_size: at most 16384"),
        ({"vision": {"hidden_size": 2**24, "intermediate_size": 2**26}}, "sizes: at most 1048576"),
        ({"vision": {"image_size": 2**14}}, r"positional_embedding_vlm: shape \(17, 32\), exp"),
        ({"vision": {"intermediate_size": 64}}, "intermediate_size: must be hidden_size / pixel"),
        ({"vision": {"vision_output_dim": 40}}, "vision_output_dim: must be equal"),
        ({"vision": {"pixel_shuffle_ratio": 0.3}}, "pixel_shuffle_ratio: must be at most 1"),
        ({"vision": {"hidden_act": "relu"}}, "the tower has 'gelu', got 'relu'"),
        ({"architectures": ["Llama4ForCausalLM"]}, "has no vision tower"),
    ],
    ids=str,
)
def test_wrong_configs_are_refused(changes, expected, folder, tmp_path):
    path = rewritten(folder, tmp_path, lambda _: None, **changes)
    with pytest.raises(CheckpointError, match=expected):
        Llama4ForConditionalGeneration.from_pretrained(path)


def test_image_tokens_may_be_named_by_id(folder, tmp_path, ours):
    changes = {"image_token_index": None, "image_token_id": IMAGE}
    path = rewritten(folder, tmp_path, lambda _: None, **changes)
    values = json.loads((path / "config.json").read_text())
    del values["image_token_index"]
    (path / "config.json").write_text(json.dumps(values))
    config = Llama4ForConditionalGeneration.from_pretrained(path, lazy_vision=True).config
    assert config.image_token_id == ours.config.image_token_id == IMAGE
    assert (config.boi_token_id, config.eoi_token_id) == (
        TOKENS.index("<|image_start|>"),
        TOKENS.index("<|image_end|>"),
    )


def test_inspect_tells_of_images_and_checks_the_tower(folder, tmp_path):
    found = inspect(folder, None, None, 1)
    assert (
        found.facts["images"] == f"tiles of 16 px, 4 tokens each (id {IMAGE}, between 259 and 260)"
    )
    assert found.problems == []
    spoilt = inspect(rewritten(folder, tmp_path, drop(LINEAR)), None, None, 1)
    assert any(f"{LINEAR}: missing" in problem for problem in spoilt.problems)
