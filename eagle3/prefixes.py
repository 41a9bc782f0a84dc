"""The tokens before each row's next one: in a tree, every row has a prefix of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class History:
    """All known tokens of one sequence, on the device; grows without being copied."""

    def __init__(self, prompt_ids: Sequence[int], max_length: int, device: torch.device) -> None:
        self._ids_S = torch.empty(max_length, dtype=torch.int64, device=device)
        self._length = 0
        self.num_prompt = len(prompt_ids)
        self.extend(prompt_ids)

    def extend(self, tokens: Sequence[int]) -> None:
        end = self._length + len(tokens)
        self._ids_S[self._length : end] = torch.tensor(tokens, device=self._ids_S.device)
        self._length = end

    @property
    def ids_S(self) -> Tensor:
        return self._ids_S[: self._length]


@dataclass(frozen=True)
class Prefixes:
    """Rows behind `known_S`, whose last token is row 0, the root. Letters: T rows, S known tokens.

    Row t continues the known tokens and the drafted ones on its path, itself included.
    """

    known_S: Tensor
    num_prompt: int
    tokens_T: Tensor
    parents_T: Tensor  # rows; the root's is not used
    positions_T: Tensor

    @property
    def depths_T(self) -> Tensor:
        """Drafted tokens on the path of each row."""
        return self.positions_T - self.positions_T[0]

    @property
    def num_output_T(self) -> Tensor:
        """Generated tokens in each row's prefix."""
        return self.depths_T + (len(self.known_S) - self.num_prompt)

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
        root = len(self.known_S) - 1
        tokens = torch.cat((self.known_S[:-1], self.tokens_T))
        before_root = torch.arange(-1, root, device=tokens.device)
        previous = torch.cat((before_root, self.parents_T[1:] + root))
        at_T = torch.arange(root, len(tokens), device=tokens.device)
        columns = []
        for _ in range(count):
            is_token_T = at_T >= 0
            at_T = at_T.clamp(min=0)
            columns.append(torch.where(is_token_T, tokens[at_T], -1))
            at_T = torch.where(is_token_T, previous[at_T], -1)
        return torch.stack(columns[::-1], dim=1)
