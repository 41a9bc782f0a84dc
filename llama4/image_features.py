"""Image rows of a prompt: which positions they stand at, and how they replace token embeddings.

A placeholder's embedding is overwritten by a projected image feature, as vLLM's
`merge_multimodal_embeddings` does. The features of a prompt stay one object for as long as it is
read, whatever the chunks: of rows [i, j) the target takes the features at positions [i, j), the
draft, whose rows carry the next token, those at [i + 1, j + 1).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.llama4.upload import upload


@dataclass(frozen=True)
class ImageFeatures:
    """`rows_FD[i]` stands at position `positions[i]` (ascending) of its prompt."""

    positions: tuple[int, ...]
    rows_FD: Tensor

    def __post_init__(self) -> None:
        assert self.rows_FD.shape[0] == len(self.positions)
        assert list(self.positions) == sorted(set(self.positions))

    @classmethod
    def of_prompt(
        cls, prompt_ids: Sequence[int], features: Sequence[Tensor], image_token_id: int
    ) -> "ImageFeatures":
        """The images' `features` (each [F, D]) in the order of the prompt's placeholders.

        Raises ValueError, with both numbers, unless there is a feature for every placeholder.
        """
        positions = tuple(i for i, token in enumerate(prompt_ids) if token == image_token_id)
        _check_count(len(positions), sum(map(len, features)), image_token_id)
        return cls(positions, torch.cat(list(features)))

    def moved(self, distance: int) -> "ImageFeatures":
        """The same rows, `distance` positions further on."""
        return ImageFeatures(tuple(at + distance for at in self.positions), self.rows_FD)

    def since(self, start: int) -> "ImageFeatures | None":
        """Those at position `start` or behind it, if there are any."""
        first = bisect_left(self.positions, start)
        if first == len(self.positions):
            return None
        return ImageFeatures(self.positions[first:], self.rows_FD[first:])

    def followed_by(self, later: "ImageFeatures | None") -> "ImageFeatures":
        """These, then `later` ones, whose positions are all higher."""
        if later is None:
            return self
        rows_FD = torch.cat((self.rows_FD, later.rows_FD))
        return ImageFeatures(self.positions + later.positions, rows_FD)

    def reach(self, start: int, stop: int) -> bool:
        """Whether a position within [start, stop) is an image's."""
        first = bisect_left(self.positions, start)
        return first < len(self.positions) and self.positions[first] < stop

    def over(self, embeds_TD: Tensor, start: int) -> Tensor:
        """`embeds_TD`, of positions `start` on, with the image rows in their places."""
        first = bisect_left(self.positions, start)
        last = bisect_left(self.positions, start + len(embeds_TD))
        rows = [position - start for position in self.positions[first:last]]
        rows_F = upload(rows, torch.int64, embeds_TD.device)
        return embeds_TD.index_copy(0, rows_F, self.rows_FD[first:last].to(embeds_TD))


def merge_multimodal_embeddings(
    input_ids_T: Tensor,
    inputs_embeds_TD: Tensor,
    multimodal_embeddings: Tensor | Sequence[Tensor],
    placeholder_token_id: int,
) -> Tensor:
    """`inputs_embeds_TD` with the rows whose id is the placeholder's overwritten, in order.

    `multimodal_embeddings` is [F, D] or one such tensor per image. Raises ValueError, with both
    numbers, unless F is the number of placeholders.
    """
    if isinstance(multimodal_embeddings, Tensor):
        multimodal_embeddings = [multimodal_embeddings]
    images = ImageFeatures.of_prompt(
        input_ids_T.tolist(), multimodal_embeddings, placeholder_token_id
    )
    return images.over(inputs_embeds_TD, 0)


def _check_count(placeholders: int, features: int, image_token_id: int) -> None:
    if placeholders != features:
        raise ValueError(
            f"images: {placeholders} placeholders (id {image_token_id}) in the prompt, but "
            f"{features} image features; every placeholder takes one"
        )
