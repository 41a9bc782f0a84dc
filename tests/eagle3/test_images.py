"""Images and drafts: the shift rule against an independent statement, and lossless speculation.

Row i of the draft holds the taps of position i and what stands at position i + 1: an image's
feature, or for `"draft_multimodal": "text"` the placeholder's own embedding. The oracle states that
with a longer embedding table, in which every image row has an id of its own. Regimes: images at the
start (its first row is seen by nobody), in the middle, at the end, two in a row; prefill passes
that end before, within and behind an image; chains and trees; both inputs.
"""

import pytest
import torch

from aerie.assets.tiny_multimodal.checkpoint import TOKENS, VISION, new_model, randomise, save
from aerie.eagle3 import engine as loop
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.drafter import ChainDrafter
from aerie.eagle3.generate import generate
from aerie.eagle3.policies import Chain, DynamicTree, StaticTree
from aerie.eagle3.reading import Reading
from aerie.eagle3.registry import load_draft
from aerie.eagle3.sampling import SamplingParams
from aerie.llama4.conditional_generation import Llama4ForConditionalGeneration
from aerie.llama4.image_features import ImageFeatures

TOLERANCE = 1e-5
IMAGE, VOCAB = TOKENS.index("<|patch|>"), len(TOKENS)
TILE = [IMAGE] * 4
TEXT = list(range(40, 50))
PROMPTS = {
    "start": [*TILE, *TEXT],
    "middle": [*TEXT[:5], *TILE, *TEXT[5:]],
    "end": [*TEXT, *TILE],
    "two in a row": [*TEXT[:3], *TILE, *TILE, 9, *TILE, *TEXT[3:]],
}
SIZES = {
    "hidden_size": 40,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "num_hidden_layers": 8,
    "attention_chunk_size": 16,
}
INPUTS = ("merged", "text")


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    model = new_model(**SIZES).eval().requires_grad_(False)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def target(theirs, tmp_path_factory):
    folder = save(theirs, tmp_path_factory.mktemp("multimodal"))
    return Llama4ForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def files(draft_files):
    changes = {"vocab_size": VOCAB, "draft_vocab_size": 64, "max_position_embeddings": 512}
    return draft_files("llama", **changes)


@pytest.fixture
def draft(files, target, tmp_path):
    """`draft(draft_input)`: the draft of `files`, told what it sees of images."""
    folder = files.write(tmp_path / "draft")
    return lambda kind: load_draft(folder, target, reading=Reading(draft_multimodal=kind))


def images_of(target, prompt) -> tuple[torch.Tensor, ImageFeatures]:
    side = VISION["image_size"]
    pixel_values = torch.randn(prompt.count(IMAGE) // 4, 3, side, side)
    images = target.image_features(prompt, pixel_values)
    assert images is not None
    return pixel_values, images


def stated_rows(prompt, following: int, draft_input) -> list[int]:
    """For every position its draft row's token: the next one's id, or V + number for image rows."""
    numbered, seen = [], 0
    for token in prompt:
        is_image = token == IMAGE and draft_input == "merged"
        numbered.append(VOCAB + seen if is_image else token)
        seen += is_image
    return [*numbered[1:], following]


@pytest.mark.parametrize("draft_input", INPUTS)
@pytest.mark.parametrize("case", PROMPTS)
def test_draft_logits_follow_the_shift_rule(
    case, draft_input, theirs, target, draft, files, oracle, assert_close
):
    prompt, following = PROMPTS[case], 77
    pixel_values, images = images_of(target, prompt)
    hidden = theirs(
        torch.tensor(prompt)[None], pixel_values=pixel_values, output_hidden_states=True
    ).hidden_states
    taps = [hidden[layer][0] for layer in (2, 4, 5)]
    table = target.get_language_model().model.embed_tokens.weight
    extended = {"model.embed_tokens.weight": torch.cat((table, images.rows_FD))}
    restated = oracle.DraftOracle(files.tensors, files.config, extended)
    rows = torch.tensor(stated_rows(prompt, following, draft_input))
    _, expected = restated.forward(restated.features(taps), rows, torch.arange(len(rows)))

    ours = draft(draft_input)
    next_ids = torch.tensor([*prompt[1:], following])
    for size in (len(prompt), 3, 6):
        cache, logits = ours.allocate_cache(len(prompt), page_size=8), []
        for start in range(0, len(prompt), size):
            part = slice(start, start + size)
            embeds = ours.merged_embeddings(next_ids[part], start, images)
            features = ours.combine_hidden_states([tap[part] for tap in taps])
            step = cache.causal_step(len(next_ids[part]))
            output = ours(next_ids[part], features, step, embeds)
            cache.commit(0, range(len(next_ids[part])))
            logits.append(ours.compute_draft_logits(output.post_norm_TD))
        assert_close(torch.cat(logits), expected, TOLERANCE)


@pytest.mark.parametrize("draft_input", INPUTS)
@pytest.mark.parametrize("rows", [1, 4, 6, 1024])
def test_the_loop_shows_the_draft_what_follows(rows, draft_input, target, draft, monkeypatch):
    """Whatever the prefill passes: the draft's rows of the prompt, one after the other."""
    monkeypatch.setattr(loop, "PREFILL_ROWS", rows)
    prompt = PROMPTS["two in a row"]
    _, images = images_of(target, prompt)
    ours, seen = draft(draft_input), []
    table = ours.embed_tokens.weight
    forward = type(ours).forward

    def recorded(self, ids, hidden, step, embeds=None):
        seen.append(table[ids] if embeds is None else embeds)
        return forward(self, ids, hidden, step, embeds)

    monkeypatch.setattr(type(ours), "forward", recorded)
    result = generate(target, prompt, 2, ours, 1, images=images, eos_token_ids=())
    stated = stated_rows(prompt, result.tokens[0], draft_input)
    expected = torch.cat((table, images.rows_FD))[stated]
    assert torch.equal(torch.cat(seen)[: len(prompt)], expected)


@pytest.mark.parametrize("draft_input", INPUTS)
@pytest.mark.parametrize(
    "policy", [Chain(3), StaticTree([[0], [1], [0, 0]]), DynamicTree(8, 3, 3)], ids=str
)
def test_speculative_ids_equal_plain_ids(policy, draft_input, target, draft, monkeypatch):
    ours = draft(draft_input)
    for case, prompt in PROMPTS.items():
        _, images = images_of(target, prompt)
        plain = generate(target, prompt, 24, images=images, eos_token_ids=())
        for rows in (5, 1024):
            monkeypatch.setattr(loop, "PREFILL_ROWS", rows)
            found = generate(
                target, prompt, 24, ours, policy=policy, images=images, eos_token_ids=()
            )
            assert found.tokens == plain.tokens, f"{case}, prefill passes of {rows}"


@pytest.mark.parametrize(("capacity", "draft_input"), [(2, "merged"), (2, "text"), (5, "merged")])
def test_images_stay_with_their_sequence(capacity, draft_input, target, draft, monkeypatch):
    """Side by side, in any order, joining late and ending early, beside texts without images.

    Two prompts have the same ids and different pictures: what is known of one says nothing of the
    other.
    """
    monkeypatch.setattr(loop, "PREFILL_ROWS", 6)
    ours = draft(draft_input)
    prompts = [TEXT, PROMPTS["middle"], PROMPTS["middle"], PROMPTS["two in a row"], TEXT[::-1]]
    images = [images_of(target, prompt)[1] if IMAGE in prompt else None for prompt in prompts]
    params = [SamplingParams(max_tokens=count) for count in (3, 14, 9, 12, 17)]
    alone = [
        generate(target, prompt, images=image, sampling=own, eos_token_ids=()).tokens
        for prompt, image, own in zip(prompts, images, params, strict=True)
    ]
    assert alone[1][:9] != alone[2]
    for order in ([0, 1, 2, 3, 4], [3, 2, 4, 1, 0]):
        together = generate(
            target,
            [prompts[i] for i in order],
            draft=ours,
            num_speculative_tokens=3,
            eos_token_ids=(),
            sampling=[params[i] for i in order],
            images=[images[i] for i in order],
            max_batch_size=capacity,
        )
        assert [one.tokens for one in together] == [alone[i] for i in order]


def test_greedy_ids_match_transformers(theirs, target):
    for prompt in PROMPTS.values():
        pixel_values, images = images_of(target, prompt)
        ids = torch.tensor(prompt)[None]
        expected = theirs.generate(
            ids, pixel_values=pixel_values, max_new_tokens=12, do_sample=False, eos_token_id=None
        )[0, len(prompt) :]
        found = generate(target, prompt, 12, images=images, eos_token_ids=())
        assert found.tokens == expected.tolist()


def test_image_rows_matter_to_the_draft(target, draft):
    """Or the tests above would show nothing: other rows behind the image, other logits."""
    prompt = PROMPTS["middle"]
    _, images = images_of(target, prompt)
    drafts, lasts = [draft(kind) for kind in INPUTS], []
    for ours in drafts:
        decoding = Decoding(target, prompt, 8, ours, 2, images=images, eos_token_ids=())
        bursts = iter(decoding)  # kept: closing it would free the row
        next(bursts)
        passes = decoding.decodings.passes
        assert isinstance(passes.drafter, ChainDrafter)
        with torch.inference_mode():
            lasts.append(passes.drafter._catch_up(passes.batch.committed(1)).next_hidden_TD)
    assert (lasts[0] - lasts[1]).abs().max() > 1e-3


def test_images_that_do_not_fit_are_refused(target):
    prompt = PROMPTS["end"]
    _, images = images_of(target, prompt)
    with pytest.raises(ValueError, match="reach position 13 of a prompt of 13 tokens"):
        Decoding(target, prompt[:-1], 8, images=images)
    with pytest.raises(ValueError, match="rows must be 40 wide, got 8"):
        Decoding(target, prompt, 8, images=ImageFeatures((0,), torch.zeros(1, 8)))


def test_a_narrower_draft_sees_placeholders_as_text_only(draft_files, target, tmp_path):
    sizes = {"hidden_size": 24, "target_hidden_size": 40, "vocab_size": VOCAB}
    files = draft_files("llama", **sizes, max_position_embeddings=512)
    files.tensors["embed_tokens.weight"] = torch.randn(VOCAB, 24)
    folder, prompt = files.write(tmp_path / "narrow"), PROMPTS["middle"]
    _, images = images_of(target, prompt)
    with pytest.raises(ValueError, match=r'width 24, .* 40; .* "draft_multimodal": "text"'):
        generate(target, prompt, 8, load_draft(folder, target), images=images)
    told = load_draft(folder, target, reading=Reading(draft_multimodal="text"))
    plain = generate(target, prompt, 8, images=images, eos_token_ids=())
    found = generate(target, prompt, 8, told, images=images, eos_token_ids=())
    assert found.tokens == plain.tokens


def test_draft_multimodal_is_checked():
    with pytest.raises(ValueError, match="draft_multimodal: must be one of merged, text, got 'x'"):
        Reading(draft_multimodal="x")
