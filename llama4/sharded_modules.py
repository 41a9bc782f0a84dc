"""The modules that are not the same on one rank of several: where a sum or a range comes in."""

import torch
from torch import Tensor

from aerie.kernels.backend import ResolvedBackend
from aerie.kernels.embedding import Embedding
from aerie.kernels.rms_norm import RMSNorm
from aerie.llama4.communicator import Communicator


class ReducedRMSNorm(RMSNorm):
    """The norm behind a block whose output is a partial sum: reduces, adds, normalises.

    The only place where the ranks meet in a layer. A kernel that does all three belongs here.
    """

    def __init__(
        self, width: int, eps: float, backend: ResolvedBackend, communicator: Communicator
    ) -> None:
        super().__init__(width, eps, backend)
        self._communicator = communicator

    def whole(self, x_TD: Tensor) -> Tensor:  # not called for the embedding, which is whole
        return self._communicator.all_reduce(x_TD)


def residual_norm(
    width: int, eps: float, backend: ResolvedBackend, communicator: Communicator | None
) -> RMSNorm:
    """The norm that a residual stream enters a block through."""
    if communicator is None:
        return RMSNorm(width, eps, backend)
    return ReducedRMSNorm(width, eps, backend, communicator)


class ShardedEmbedding(Embedding):
    """A range of the vocabulary on every rank; each row is the sum of one row and of zeros.

    An id outside the vocabulary is left to the ranks at its ends, who treat it as `Embedding` does.
    """

    def __init__(
        self, num_rows: int, width: int, backend: ResolvedBackend, communicator: Communicator
    ) -> None:
        own, shard = communicator.shard.part(num_rows), communicator.shard
        super().__init__(own.stop - own.start, width, backend)
        self._communicator = communicator
        limits = torch.iinfo(torch.int64)
        self._start = own.start
        self._first = limits.min if shard.rank == 0 else own.start
        self._last = limits.max if shard.rank == shard.size - 1 else own.stop - 1

    def forward(self, ids_T: Tensor) -> Tensor:
        is_own_T = (ids_T >= self._first) & (ids_T <= self._last)
        rows_TD = super().forward(torch.where(is_own_T, ids_T - self._start, 0))
        return self._communicator.all_reduce(rows_TD.masked_fill_(~is_own_T[:, None], 0.0))


def token_embedding(
    num_rows: int, width: int, backend: ResolvedBackend, communicator: Communicator | None
) -> Embedding:
    if communicator is None:
        return Embedding(num_rows, width, backend)
    return ShardedEmbedding(num_rows, width, backend, communicator)
