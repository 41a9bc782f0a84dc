"""Training rows cut from the topics."""

from collections.abc import Sequence

import torch

from aerie.assets.build.tokenizer import BOS_ID, EOS_ID


class RowSampler:
    """Rows as a served model meets them: bos, then text that starts anywhere in a topic."""

    def __init__(self, topics: Sequence[list[int]], seed: int) -> None:
        self.topics = [torch.tensor([*ids, EOS_ID]) for ids in topics]
        self.sizes = torch.tensor([len(ids) for ids in topics], dtype=torch.float)
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, num_rows: int, length: int) -> torch.Tensor:
        """[num_rows, length] token ids."""
        return torch.stack([self._row(length) for _ in range(num_rows)])

    def _row(self, length: int) -> torch.Tensor:
        pieces, size = [], 0
        while size < length:
            piece = self._piece(from_start=bool(pieces))
            pieces.append(piece)
            size += len(piece)
        return torch.cat(pieces)[:length]

    def _piece(self, from_start: bool) -> torch.Tensor:
        topic = self.topics[int(torch.multinomial(self.sizes, 1, generator=self.generator))]
        start = 0
        if not from_start:
            start = int(torch.randint(len(topic), (1,), generator=self.generator))
        return torch.cat([torch.tensor([BOS_ID]), topic[start:]])
