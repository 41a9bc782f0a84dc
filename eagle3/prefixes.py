"""The tokens before each row's next one: in a tree, every row has a prefix of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefixes:
    """Rows of one sequence, whose first `num_known` ids are known; the last of them is row 0's, the
    root's. Letters: T rows, S positions (ids behind the known ones are anything in the vocabulary).

    Row t continues the known tokens and the drafted ones on its path, itself included.
    """

    ids_S: Tensor
    num_known: Tensor  # a number that only the device knows
    num_prompt: int
    tokens_T: Tensor
    parents_T: Tensor  # rows; the root's is not used
    depths_T: Tensor  # drafted tokens on the path of each row

    @property
    def num_output_T(self) -> Tensor:
        """Generated tokens in each row's prefix."""
        return self.depths_T + (self.num_known - self.num_prompt)

    def known_since(self, first: int) -> Tensor:
        """[S], whether an id is known and stands at position `first` or later."""
        position_S = torch.arange(len(self.ids_S), device=self.ids_S.device)
        return (position_S >= first) & (position_S < self.num_known)

    def drafted_TT(self) -> Tensor:
        """Whether row j, not the root, lies on the path of row t."""
        own_TT = torch.eye(len(self.tokens_T), dtype=torch.bool, device=self.tokens_T.device)
        parents_T = self.parents_T.clamp(min=0)
        path_TT = own_TT
        for _ in range(len(self.tokens_T) - 1):  # paths are at most that long
            path_TT = own_TT | path_TT[parents_T]
        path_TT = path_TT.clone()
        path_TT[:, 0] = False
        return path_TT

    def last_tokens(self, count: int) -> Tensor:
        """[T, count], the last tokens of each prefix in reading order; -1 before its start."""
        parents_T, columns = self.parents_T.clamp(min=0), []
        row_T = torch.arange(len(self.tokens_T), device=self.tokens_T.device)
        for back in range(count):
            position_T = self.num_known - 1 + self.depths_T - back
            known_T = self.ids_S[position_T.clamp(0, len(self.ids_S) - 1)]
            known_T = torch.where(position_T >= 0, known_T, -1)
            columns.append(torch.where(self.depths_T > back, self.tokens_T[row_T], known_T))
            row_T = parents_T[row_T]
        return torch.stack(columns[::-1], dim=1)

    def whole(self, depth: int) -> Tensor:
        """[rows of `depth`, length], whole prefixes, which have one length. Reads the device."""
        rows = (self.depths_T == depth).nonzero().flatten()
        ids = self.ids_S[: int(self.num_known)].expand(len(rows), -1)
        return torch.cat((ids, self.last_tokens(depth)[rows]), dim=1) if depth else ids
