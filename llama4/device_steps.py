"""Steps of a decoding loop: every sequence has as many rows, its length is known to the device.

Nothing here reads the device, and the shapes depend on the counts alone: so a round of the loop can
be captured in a CUDA graph, and the host need not know what the round before has accepted. Rows
that turn out to be none, behind those accepted, are overwritten by the next step.

A graph reads addresses and holds no tensors. What is built once here is therefore never dropped:
prompts of other lengths must not take the place of what a captured round goes on reading.

Letters: B sequences of the step, N rows of each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from aerie.kernels.tree_rows import MAX_TREE_ROWS, TreeRows
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.kv_pool import rows_of
from aerie.llama4.step import DeviceTree, Placement, Step, Tree

Others = ParamSpec("Others")
Built = TypeVar("Built")


def kept_for_rounds(
    build: Callable[Concatenate[int, Others], Built],
) -> Callable[Concatenate[int, Others], Built]:
    """`build` of a count, once for every count that a tree can have; anew for larger ones, such as
    a prompt's, of which there are too many to keep. What a capture builds anew is in its graph."""
    built = torch.inference_mode(False)(build)
    kept = cache(built)

    @wraps(build)
    def of(count: int, *others: Others.args, **named: Others.kwargs) -> Built:
        return (kept if count <= MAX_TREE_ROWS else built)(count, *others, **named)

    return of


def device_step(
    cache: PagedKVCache, lengths_B: Tensor, shape: DeviceTree, first_sequence: int = 0
) -> Step:
    """A step of the rows `shape` behind `lengths_B` (int64), of B sequences from the first on.

    A sequence without pages writes nothing and reads what it pleases.
    """
    (sequences,), rows = lengths_B.shape, shape.depths_N.shape[-1]
    slots_BN = lengths_B[:, None] + counting(rows, lengths_B.device)
    is_chain = shape.words_N is None
    positions_BN = slots_BN if is_chain else lengths_B[:, None] + shape.depths_N
    pool = cache.pools[0]
    tree_rows = TreeRows(
        positions_T=positions_BN.view(-1),
        row_starts_B1=_row_starts(rows, sequences, lengths_B.device),
        prefix_lengths_B=lengths_B.int(),
        page_table_BM=rows_of(pool.page_table_BM, first_sequence, sequences),
        ancestors_T=None if shape.words_N is None else per_row(shape.words_N, sequences),
        max_rows=rows,
    )
    placements = []
    for pool in cache.pools:
        slots_T = rows_of(pool.slots_BS, first_sequence, sequences).gather(1, slots_BN).view(-1)
        if placements:
            table_BM = rows_of(pool.page_table_BM, first_sequence, sequences)
            tree_rows = replace(tree_rows, page_table_BM=table_BM)
        placements.append(Placement(tree_rows, slots_T))
    return Step(tuple(placements), cache)


@dataclass(frozen=True)
class SuccessiveSteps:
    """Steps of one row per sequence, each behind the one before; `positions_NB` is theirs."""

    positions_NB: Tensor
    steps: list[Step]


def successive_steps(cache: PagedKVCache, lengths_B: Tensor, count: int) -> SuccessiveSteps:
    """`count` of `device_step`'s, one row each, drawn up together: step n stands at `lengths_B` + n
    and sees the rows of those before it. A drafted chain would otherwise ask for each on its own.
    """
    (sequences,), device = lengths_B.shape, lengths_B.device
    positions_NB = lengths_B + counting(count, device)[:, None]
    prefixes_NB, starts_B1 = positions_NB.int(), _row_starts(1, sequences, device)
    placements: list[list[Placement]] = [[] for _ in range(count)]
    for pool in cache.pools:
        table_BM = rows_of(pool.page_table_BM, 0, sequences)
        slots_NB = rows_of(pool.slots_BS, 0, sequences).t().gather(0, positions_NB)
        for n, (positions_B, prefixes_B, slots_B) in enumerate(
            zip(positions_NB.unbind(), prefixes_NB.unbind(), slots_NB.unbind(), strict=True)
        ):
            rows = TreeRows(positions_B, starts_B1, prefixes_B, table_BM, None, 1)
            placements[n].append(Placement(rows, slots_B))
    return SuccessiveSteps(positions_NB, [Step(tuple(own), cache) for own in placements])


def commit_paths(cache: PagedKVCache, lengths_B: Tensor, path_BP: Tensor) -> None:
    """Moves the rows `path_BP` (ascending; -1: none) of the last step to the front, in place."""
    sequences, rows = path_BP.shape
    targets_BP = lengths_B[:, None] + counting(rows, lengths_B.device)
    sources_BP = lengths_B[:, None] + path_BP.clamp(min=0)
    for pool in cache.pools:
        slots_BS = rows_of(pool.slots_BS, 0, sequences)
        source_BP = slots_BS.gather(1, sources_BP).masked_fill_(path_BP < 0, -1)
        target_BP = slots_BS.gather(1, targets_BP)
        cache.move_slots(pool.k_LRCGK, pool.v_LRCGK, source_BP.view(-1), target_BP.view(-1))


def per_row(values_N: Tensor, sequences: int) -> Tensor:
    """[N], shared by all sequences, or [B, N], as contiguous [B * N]."""
    if values_N.ndim == 1:
        values_N = values_N.expand(sequences, -1)
    return values_N.contiguous().view(-1)


@kept_for_rounds
def chain_shape(rows: int, device: torch.device) -> DeviceTree:
    """`rows` rows, each the child of the one before."""
    depths_N = torch.arange(rows, device=device)
    return DeviceTree(depths_N - 1, depths_N, None)


@cache
@torch.inference_mode(False)
def device_shape(tree: Tree, device: torch.device) -> DeviceTree:
    """`tree` on the device, built once."""
    columns = tree.parents, tree.depths(), tree.ancestor_words()
    return DeviceTree(*(torch.tensor(column, device=device).long() for column in columns))


@kept_for_rounds
def counting(count: int, device: torch.device) -> Tensor:
    """0 .. count - 1."""
    return torch.arange(count, device=device)


@kept_for_rounds
def _row_starts(rows: int, sequences: int, device: torch.device) -> Tensor:
    return torch.arange(0, (sequences + 1) * rows, rows, dtype=torch.int32, device=device)
