"""Where the rows of one forward pass stand: their tree, their placement in the cache, the step.

`PagedKVCache` draws up steps whose lengths the host knows, `device_steps` those of a decoding loop.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from aerie.kernels.scaled_linear import quantises_rows
from aerie.kernels.tree_rows import TreeRows

if TYPE_CHECKING:
    from aerie.llama4.cache import PagedKVCache


@dataclass(frozen=True)
class Tree:
    """New rows of one sequence: row 0 is the root, whose parent is -1; `parents[i] < i`."""

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises ValueError unless parents come before their children (-1: the prefix itself)."""
        if not all(-1 <= parent < row for row, parent in enumerate(self.parents)):
            raise ValueError(
                f"parents: entry i must be an earlier row 0..i-1, or -1, got {self.parents}"
            )

    def depths(self) -> list[int]:
        """Edges between the root and each row."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def ancestor_words(self) -> list[int]:
        """One signed 64-bit word per row: bit j is set if row j is the row or an ancestor."""
        words: list[int] = []
        for row, parent in enumerate(self.parents):
            words.append((1 << row) | (words[parent] if parent >= 0 else 0))
        return [word - (1 << 64) if word >= 1 << 63 else word for word in words]


@dataclass(frozen=True, eq=False)
class DeviceTree:
    """A `Tree` drawn up on the device, int64: so that a drafted shape need not be read.

    [N] for all sequences alike, or [B, N], of each its own.
    """

    parents_N: Tensor
    depths_N: Tensor
    words_N: Tensor | None  # ancestors, as `Tree.ancestor_words`; None: a chain


@dataclass(frozen=True)
class Placement:
    """The rows of a step, and where their keys and values go, in the layers of one pool."""

    rows: TreeRows
    slots_T: Tensor


@dataclass(frozen=True)
class Step:
    """Where the T rows of one forward pass stand: one placement per pool of the cache.

    `quantises_rows` says whether it is a prompt whose rows meet FP8 weights of linears as codes.
    """

    placements: tuple[Placement, ...]
    cache: "PagedKVCache"
    quantises_rows: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantises_rows", quantises_rows(self.rows.max_rows))

    @property
    def rows(self) -> TreeRows:
        """Positions, row starts and ancestors, which all pools share."""
        return self.placements[0].rows

    @property
    def slots_T(self) -> Tensor:
        """Slots in the first pool."""
        return self.placements[0].slots_T

    def check_ids(self, input_ids_T: Tensor) -> None:
        """Raises ValueError unless there is one id for every row."""
        wanted = self.rows.positions_T.shape
        if input_ids_T.shape != wanted:
            raise ValueError(
                f"input_ids_T: must be [{wanted[0]}], an id for every row of the step, those of "
                f"all sequences behind each other, got {list(input_ids_T.shape)}"
            )
