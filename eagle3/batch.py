"""The running sequences as columns on the device: row b of every column is sequence b.

A round reads and writes them in place and never asks the host; the host moves whole rows between
rounds, when sequences join and leave. Running sequences stand side by side from row 0 on.

Letters: B sequences, P rows that a round commits at most, D target width, S positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.kernels.accept import Acceptance
from aerie.llama4.device_steps import counting
from aerie.llama4.kv_pool import rows_of


@dataclass(frozen=True)
class Committed:
    """What the last pass of the target committed, of the first sequences of a batch.

    Row p < counts of a sequence stands at position starts + p; `next_ids_BP` is the token behind
    it, and `taps_BPD` its taps: what the draft is rebuilt from. The rows further on are anything.
    """

    starts_B: Tensor
    counts_B: Tensor
    lengths_B: Tensor  # starts + counts
    next_ids_BP: Tensor
    taps_BPD: tuple[Tensor, ...]


class Batch:
    """Room for `capacity` sequences of `max_length` positions, `max_path` committed in a round."""

    def __init__(
        self,
        capacity: int,
        max_length: int,
        max_path: int,
        num_taps: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def column(*shape: int) -> Tensor:
            return torch.zeros(capacity, *shape, dtype=torch.int64, device=device)

        self.capacity, self.max_path, self.device = capacity, max_path, device
        self.lengths_B = column()  # positions whose keys and values count
        self.starts_B = column()  # ... before the last pass
        self.counts_B = column()
        self.roots_B = column()  # the token at position `lengths`: known, not yet run
        self.is_running_B = column()  # 0 where a row only fills up a captured round
        self.next_ids_BP = column(max_path)
        self.ids_BS = column(max_length + max_path)  # all known tokens, up to position `lengths`
        self.taps_BPD = tuple(
            torch.zeros(capacity, max_path, width, dtype=dtype, device=device)
            for _ in range(num_taps)
        )
        self.width = 0  # columns of `next_ids_BP` and `taps_BPD` that the last pass may have filled

    @property
    def columns(self) -> list[Tensor]:
        """All of them."""
        return [
            self.lengths_B, self.starts_B, self.counts_B, self.roots_B, self.is_running_B,
            self.next_ids_BP, self.ids_BS, *self.taps_BPD,
        ]  # fmt: skip

    def committed(self, sequences: int) -> Committed:
        """Of the first `sequences` rows."""
        width = self.width
        return Committed(
            rows_of(self.starts_B, 0, sequences),
            rows_of(self.counts_B, 0, sequences),
            rows_of(self.lengths_B, 0, sequences),
            rows_of(self.next_ids_BP, 0, sequences)[:, :width],
            tuple(rows_of(tap_BPD, 0, sequences)[:, :width] for tap_BPD in self.taps_BPD),
        )

    def join(self, row: int, prompt_ids_T: Tensor, num_cached: int = 0) -> None:
        """A sequence with a known beginning, of which `num_cached` tokens have run."""
        self.counts_B[row] = self.is_running_B[row] = 0
        self.has_run(row, num_cached)
        self.ids_BS[row, : len(prompt_ids_T)] = prompt_ids_T

    def has_run(self, row: int, length: int) -> None:
        """`length` tokens of a prompt have: a round that is filled up with this row, before its
        own, writes behind them and nowhere else."""
        self.lengths_B[row] = self.starts_B[row] = length

    def begin(self, row: int, root_T: Tensor, taps_TD: Sequence[Tensor]) -> None:
        """The prompt of sequence `row` has run; `root_T` [1] is chosen behind its last row, whose
        taps `taps_TD` [1, D] the draft has yet to see."""
        token_T = root_T.clamp(min=0)
        self.counts_B[row] = 1
        self.is_running_B[row] = 1
        self.starts_B[row] = self.lengths_B[row] - 1
        self.roots_B[row : row + 1] = token_T
        self.next_ids_BP[row, :1] = token_T
        self.ids_BS[row].scatter_(0, self.lengths_B[row : row + 1], token_T)
        for tap_BPD, tap_TD in zip(self.taps_BPD, taps_TD, strict=True):
            tap_BPD[row, :1] = tap_TD
        self.width = max(self.width, 1)

    def commit(self, accepted: Acceptance, taps_BPD: Sequence[Tensor], *, keep_ids: bool) -> None:
        """What a round accepted of the first sequences. A negative id (no token could be chosen)
        becomes 0 here: the host will find it in its own copy and stop."""
        sequences, width = accepted.ids_BP.shape
        starts_B, lengths_B = (rows_of(x, 0, sequences) for x in (self.starts_B, self.lengths_B))
        counts_B = rows_of(self.counts_B, 0, sequences)
        ids_BP = accepted.ids_BP.clamp(min=0)
        starts_B.copy_(lengths_B)
        torch.add(accepted.num_accepted_B, 1, out=counts_B)
        lengths_B.addcmul_(counts_B, rows_of(self.is_running_B, 0, sequences))
        rows_of(self.roots_B, 0, sequences).copy_(accepted.bonus_B).clamp_(min=0)
        rows_of(self.next_ids_BP, 0, sequences)[:, :width].copy_(ids_BP)
        if keep_ids:
            # a row that only fills up the round may be one whose prompt is being read
            is_own_B1 = rows_of(self.is_running_B, 0, sequences)[:, None] > 0
            at_BP = starts_B[:, None] + (1 + counting(width, self.device))
            ids_BS = rows_of(self.ids_BS, 0, sequences)
            ids_BS.scatter_(1, at_BP, torch.where(is_own_B1, ids_BP, ids_BS.gather(1, at_BP)))
        for own_BPD, tap_BPD in zip(self.taps_BPD, taps_BPD, strict=True):
            rows_of(own_BPD, 0, sequences)[:, :width].copy_(tap_BPD)
        self.width = width

    def move(self, source: int, target: int) -> None:
        """Sequence `source` becomes row `target`; row `source` is idle."""
        for column in self.columns:
            column[target] = column[source]
        self.leave(source)

    def leave(self, row: int) -> None:
        """Row `row` is idle: it may still run in a captured round, always at position 0."""
        for column_B in (self.lengths_B, self.starts_B, self.is_running_B):
            column_B[row] = 0
