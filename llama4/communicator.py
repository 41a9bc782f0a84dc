"""What the ranks of a tensor-parallel group tell each other, over `torch.distributed`.

Sums of partial results are all that the model needs. Choices are exchanged as keys and counts, a
few numbers a row, never as rows of logits. One process has no communicator, and so no call.

Every rank makes the same calls in the same order with the same shapes. A rank that dies ends the
others' calls with an error, at the latest after the group's timeout.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.sharding import WHOLE, Shard

LOADING = timedelta(hours=1)  # ranks may read at different speeds
T = TypeVar("T")


class Communicator:
    """The collectives of one group; `shard` is this process's place in it."""

    def __init__(
        self, group: dist.ProcessGroup | DeviceMesh, *, expert_parallel: bool = False
    ) -> None:
        """`group` is initialised already; of a mesh, which has one dimension, it is its group.

        All of its processes must come here: they make a second group, for what is said on the host.
        """
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"group: a mesh must have one dimension, got {group.ndim}; give mesh['tp']"
                )
            group = group.get_group()
        self.group = group
        self.shard = Shard(dist.get_rank(group), dist.get_world_size(group), expert_parallel)
        self._ranks = dist.get_process_group_ranks(group)
        self._host = _host_group(group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on all of them; in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def all_max(self, x: Tensor) -> Tensor:
        """The maximum over the ranks; in place."""
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`, in the order of the ranks, along a new first dimension."""
        gathered = x.new_empty(self.shard.size, *x.shape)
        dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=self.group)
        return gathered

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`; in place."""
        dist.broadcast(x, self._ranks[0], group=self.group)
        return x

    def collect_rows(self, rows: Tensor, total: int) -> Tensor | None:
        """All ranks' parts of a matrix of `total` rows, on rank 0; the others get None."""
        if self.shard.rank > 0:
            dist.send(rows.contiguous(), self._ranks[0], group=self.group)
            return None
        whole = rows.new_empty(total, *rows.shape[1:])
        whole[: len(rows)] = rows
        for rank in range(1, self.shard.size):
            part = Shard(rank, self.shard.size).part(total)
            dist.recv(whole[part], self._ranks[rank], group=self.group)
        return whole

    def from_first(self, value: T) -> T:
        """Rank 0's `value`, any object, on the host."""
        box = [value]
        dist.broadcast_object_list(box, self._ranks[0], group=self._host)
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`, once it succeeded on every rank.

        Where it raised on one rank, all raise, the others a CheckpointError that says which one and
        what: none goes on alone and waits.
        """
        error: Exception | None = None
        result = None
        try:
            result = work()
        except Exception as raised:  # whatever it is, the others must not wait
            error = raised
        errors: list[str | None] = [None] * self.shard.size
        dist.all_gather_object(errors, None if error is None else str(error), group=self._host)
        if error is not None:
            raise error
        others = [f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None]
        if others:
            raise CheckpointError("\n".join(others))
        return result  # pyright: ignore[reportReturnType]  work's own


@lru_cache
def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The same ranks over gloo, made once: they meet for it."""
    ranks = dist.get_process_group_ranks(group)
    host = dist.new_group(ranks, LOADING, "gloo", use_local_synchronization=True)
    assert isinstance(host, dist.ProcessGroup), "a member of the group it was made for"
    return host


class LoneRank(Communicator):
    """A rank's place without the others, for a model that is planned or looked at: its sums are
    its own summands."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


def communicator_of(
    group: dist.ProcessGroup | DeviceMesh | None, expert_parallel: bool = False
) -> Communicator | None:
    """That of a group of several ranks; None for one process, which has nobody to talk to."""
    if group is None or group.size() == 1:
        return None
    return Communicator(group, expert_parallel=expert_parallel)


def shard_of(communicator: Communicator | None) -> Shard:
    """The part of the model that this process holds."""
    return WHOLE if communicator is None else communicator.shard


def agreed(work: Callable[[], T], communicator: Communicator | None) -> T:
    """`work`, which all ranks finish or none does."""
    return work() if communicator is None else communicator.together(work)


def from_first(value: T, communicator: Communicator | None) -> T:
    """What rank 0 decided, on all ranks."""
    return value if communicator is None else communicator.from_first(value)
