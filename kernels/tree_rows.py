"""Where the rows of one step stand in their sequences, and which keys each of them sees.

The kernel reads `TreeRows` as it is. The reference turns it into explicit slots and masks, once per
step, as all layers of the step share them.

Letters: T rows, B sequences, N rows of one sequence, S keys, M pages per sequence.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_TREE_ROWS = 64  # bits of an ancestor word
ROW_BLOCK = 256  # rows of a prompt that the reference attends at once; bounds its scores


@dataclass(frozen=True, eq=False)
class TreeRows:
    """Where the T query rows of one step stand. All layers of the step share one instance."""

    positions_T: Tensor  # int64, prefix + depth, not the slot; consecutive if ancestors_T is None
    row_starts_B1: Tensor  # int32, rows of sequence b are row_starts[b] : row_starts[b + 1]
    prefix_lengths_B: Tensor  # int32, keys already committed in the cache
    page_table_BM: Tensor  # int32, page of every C logical slots; unused entries may hold anything
    ancestors_T: Tensor | None  # int64, bit j = sees new row j of its sequence; None = causal
    max_rows: int  # host bound on the rows of a sequence: the grid's size
    memo: dict = field(default_factory=dict, init=False, repr=False)  # what all layers share


@dataclass(frozen=True, eq=False)
class SeenKeys:
    """What some rows of one sequence read: slots, and an additive mask."""

    rows: slice
    slots: Tensor | slice  # flat; a slice where they follow each other, which needs no gather
    bias_NS: Tensor  # 0 or -inf; [1, 1] where a single row sees all
    is_all: bool  # whether these are all rows of the step
    _packed: dict = field(default_factory=dict, init=False, repr=False)  # memo of `bias`

    def bias(self, packed_rows: int) -> Tensor:
        """The mask of rows that are packed with their heads, a row's heads side by side."""
        if self.bias_NS.shape[0] == 1:
            return self.bias_NS
        if packed_rows not in self._packed:
            repeats = packed_rows // self.bias_NS.shape[0]
            self._packed[packed_rows] = self.bias_NS.repeat_interleave(repeats, dim=0)
        return self._packed[packed_rows]


def seen_keys(rows: TreeRows, page_size: int, chunk_size: int | None) -> list[SeenKeys]:
    """Built once per step and chunk size, then shared by all layers."""
    if (page_size, chunk_size) not in rows.memo:
        starts, prefixes = rows.row_starts_B1.tolist(), rows.prefix_lengths_B.tolist()
        rows.memo[page_size, chunk_size] = [
            seen
            for b, prefix in enumerate(prefixes)
            if starts[b] < starts[b + 1]
            for seen in _seen_by_sequence(
                rows, b, slice(*starts[b : b + 2]), prefix, page_size, chunk_size
            )
        ]
    return rows.memo[page_size, chunk_size]


def _seen_by_sequence(
    rows: TreeRows, b: int, own: slice, prefix: int, page_size: int, chunk_size: int | None
) -> list[SeenKeys]:
    """The root stands at position `prefix`, so no row looks further back than its chunk."""
    new = own.stop - own.start
    is_all = new == rows.positions_T.shape[0]
    first = 0 if chunk_size is None else prefix // chunk_size * chunk_size
    slots = _flat_slots(rows.page_table_BM[b], first, prefix + new, page_size)
    if new == 1:
        return [SeenKeys(own, slots, _sees_all(rows.positions_T.device), is_all)]
    if chunk_size is not None and first + chunk_size >= prefix + new:
        chunk_size = None  # all of them stand in one chunk, which the slots begin with
    if rows.ancestors_T is None and chunk_size is None:
        causal_bias = _short_causal_bias if new <= MAX_TREE_ROWS else _causal_bias
        bias_NS = F.pad(causal_bias(new, rows.positions_T.device), (prefix - first, 0))
    else:
        visible_NS = _visible(rows, own, prefix - first, first, chunk_size)
        bias_NS = torch.zeros_like(visible_NS, dtype=torch.float32)
        bias_NS.masked_fill_(~visible_NS, -torch.inf)
    if new <= ROW_BLOCK:
        return [SeenKeys(own, slots, bias_NS, is_all)]
    starts = range(own.start, own.stop, ROW_BLOCK)
    return [
        SeenKeys(slice(start, start + block_NS.shape[0]), slots, block_NS, False)
        for start, block_NS in zip(starts, bias_NS.split(ROW_BLOCK), strict=True)
    ]


@torch.inference_mode(False)
def _causal_bias(rows: int, device: torch.device) -> Tensor:
    return torch.full((rows, rows), -torch.inf, device=device).triu_(1)


_short_causal_bias = lru_cache(maxsize=MAX_TREE_ROWS)(_causal_bias)  # a prompt's is megabytes


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _sees_all(device: torch.device) -> Tensor:
    return torch.zeros(1, 1, device=device)


def _flat_slots(table_M: Tensor, first: int, end: int, page_size: int) -> Tensor | slice:
    """Slots of the logical slots `first` .. `end` - 1."""
    numbers = table_M[first // page_size : (end - 1) // page_size + 1].tolist()
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        start = numbers[0] * page_size + first % page_size
        return slice(start, start + end - first)
    logical_S = torch.arange(first, end, device=table_M.device)
    return table_M[logical_S // page_size].long() * page_size + logical_S % page_size


def _visible(
    rows: TreeRows, own: slice, num_prefix: int, first: int, chunk_size: int | None
) -> Tensor:
    """Whether row n sees key s; the keys are slots `first` .. of the prefix, then the rows."""
    position_N = rows.positions_T[own]
    j_N = torch.arange(position_N.numel(), device=position_N.device)
    if rows.ancestors_T is None:
        related_NN = j_N <= j_N[:, None]
    else:
        related_NN = (rows.ancestors_T[own][:, None] >> j_N) & 1 == 1
    visible_NS = related_NN.new_ones(related_NN.shape[0], num_prefix + related_NN.shape[0])
    visible_NS[:, num_prefix:] = related_NN
    if chunk_size is not None:
        prefix_S = torch.arange(first, first + num_prefix, device=position_N.device)
        key_position_S = torch.cat([prefix_S, position_N])
        visible_NS &= key_position_S >= (position_N // chunk_size * chunk_size)[:, None]
    return visible_NS
