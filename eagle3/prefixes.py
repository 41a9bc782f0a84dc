"""The tokens before each row's next one: in a tree, every row has a prefix of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.llama4.device_steps import counting


@dataclass(frozen=True)
class Prefixes:
    """N rows of each of B sequences, whose first `num_known_B` ids are known; the last of them is
    row 0's, the root's. S positions; ids behind the known ones are anything in the vocabulary.

    A row continues the known tokens and the drafted ones on its path, itself included.
    """

    ids_BS: Tensor
    num_known_B: Tensor
    num_prompt_B: Tensor
    tokens_BN: Tensor
    parents_BN: Tensor  # rows; the root's is not used
    depths_BN: Tensor  # drafted tokens on the path of each row
    words_BN: Tensor | None  # ancestors, a bit per row; None: a chain

    @property
    def num_output_BN(self) -> Tensor:
        """Generated tokens in each row's prefix."""
        return self.depths_BN + (self.num_known_B - self.num_prompt_B)[:, None]

    def known_since(self, first_B: Tensor) -> Tensor:
        """[B, S], whether an id is known and stands at its sequence's `first` or later."""
        position_S = counting(self.ids_BS.shape[1], self.ids_BS.device)
        return (position_S >= first_B[:, None]) & (position_S < self.num_known_B[:, None])

    def drafted_BNN(self) -> Tensor:
        """1 where row j, not the root, lies on the path of row i."""
        rows_N = counting(self.tokens_BN.shape[1], self.tokens_BN.device)
        if self.words_BN is None:
            path_BNN = (rows_N[:, None] >= rows_N).long().expand(len(self.tokens_BN), -1, -1)
        else:
            path_BNN = (self.words_BN[:, :, None] >> rows_N) & 1
        return path_BNN * (rows_N > 0)

    def last_tokens(self, count: int) -> Tensor:
        """[B, N, count], the last tokens of each prefix in reading order; -1 before its start."""
        parents_BN, last = self.parents_BN.clamp(min=0), self.ids_BS.shape[1] - 1
        rows_N = counting(self.tokens_BN.shape[1], self.tokens_BN.device)
        row_BN = rows_N.expand_as(self.tokens_BN)
        tails_BNC = self.tokens_BN.new_empty(*self.tokens_BN.shape, count)
        for back in range(count):
            position_BN = self.num_known_B[:, None] - 1 + self.depths_BN - back
            known_BN = self.ids_BS.gather(1, position_BN.clamp(0, last))
            known_BN = torch.where(position_BN >= 0, known_BN, -1)
            drafted_BN = self.tokens_BN.gather(1, row_BN)
            is_drafted_BN = self.depths_BN > back
            tails_BNC[:, :, count - 1 - back] = torch.where(is_drafted_BN, drafted_BN, known_BN)
            row_BN = parents_BN.gather(1, row_BN)
        return tails_BNC

    def of(self, sequence: int) -> "Prefixes":
        """Those of one sequence."""
        own = slice(sequence, sequence + 1)
        return Prefixes(
            self.ids_BS[own],
            self.num_known_B[own],
            self.num_prompt_B[own],
            self.tokens_BN[own],
            self.parents_BN[own],
            self.depths_BN[own],
            None if self.words_BN is None else self.words_BN[own],
        )

    def whole(self, depth: int) -> Tensor:
        """[rows of `depth`, length] of one sequence, whole prefixes, which have one length. Reads
        the device."""
        rows = (self.depths_BN[0] == depth).nonzero().flatten()
        ids = self.ids_BS[:, : int(self.num_known_B)].expand(len(rows), -1)
        return torch.cat((ids, self.last_tokens(depth)[0, rows]), dim=1) if depth else ids
