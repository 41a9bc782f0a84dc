"""Image rows in their places: whole prompts, chunks, the draft's shifted view, wrong counts.

Regimes: images at the start, at the end, two in a row, across a chunk edge; ranges that reach none.
"""

import pytest
import torch

from aerie.llama4.image_features import ImageFeatures, merge_multimodal_embeddings

IMAGE = 9
PROMPT = [9, 9, 1, 2, 9, 9, 9, 3, 4, 9]


def images_and_embeds():
    features = [torch.full((n, 4), float(i)) + torch.arange(n)[:, None] for n, i in PARTS]
    return features, torch.zeros(len(PROMPT), 4)


PARTS = ((2, 10), (3, 20), (1, 30))
MERGED = [10, 11, 0, 0, 20, 21, 22, 0, 0, 30]


def test_placeholders_are_overwritten_in_order():
    features, embeds = images_and_embeds()
    merged = merge_multimodal_embeddings(torch.tensor(PROMPT), embeds, features, IMAGE)
    assert merged[:, 0].tolist() == MERGED
    assert embeds.count_nonzero() == 0, "the embeddings given are not written to"
    joined = merge_multimodal_embeddings(torch.tensor(PROMPT), embeds, torch.cat(features), IMAGE)
    assert torch.equal(merged, joined)


@pytest.mark.parametrize("size", range(1, len(PROMPT) + 1))
@pytest.mark.parametrize("shift", [0, 1])
def test_chunks_add_up_to_the_prompt(size, shift):
    """`shift` 1 is the draft's view: row i has what stands at i + 1."""
    features, _ = images_and_embeds()
    images = ImageFeatures.of_prompt(PROMPT, features, IMAGE)
    seen = []
    for start in range(0, len(PROMPT), size):
        rows = min(size, len(PROMPT) - start)
        part = images.over(torch.zeros(rows, 4), start + shift)
        assert images.reach(start + shift, start + shift + rows) == bool(part.count_nonzero())
        seen += part[:, 0].tolist()
    assert seen == [*MERGED, 0][shift : shift + len(PROMPT)]


def test_rows_take_the_type_of_the_embeddings():
    images = ImageFeatures((1,), torch.ones(1, 4, dtype=torch.float64))
    assert images.over(torch.zeros(2, 4, dtype=torch.bfloat16), 0).dtype == torch.bfloat16


@pytest.mark.parametrize("number", [0, 5, 7])
def test_wrong_counts_name_both_numbers(number):
    with pytest.raises(ValueError, match=rf"6 placeholders \(id 9\).*{number} image features"):
        merge_multimodal_embeddings(
            torch.tensor(PROMPT), torch.zeros(len(PROMPT), 4), torch.zeros(number, 4), IMAGE
        )
