"""Which rows an expert gets: the (row, choice) pairs of a step sorted by expert, cut into tiles.

    pairs = argsort of ids, stable                       pair p is row p // A, choice p % A
    tile  = (expert, first position in pairs, count)     at most `tile_pairs` of one expert each

Experts that are not here (below `first_expert`, or behind the last) form one more group, the last,
whose tiles have expert -1. All sizes are known on the host, nothing is read back: there are as many
slots as tiles could exist, and those left over have a count of 0. Integers: always the same bits.

One program per expert counts all ids and writes the pairs and tiles of its own.

Letters: T rows, A experts per token, E experts, P = T * A pairs, N slots for tiles.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable

MAX_PAIRS = 2**20  # every program reads all ids
MAX_EXPERTS = 1024
ELSEWHERE = tl.constexpr(-1)


@dataclass(frozen=True)
class ExpertOrder:
    """`pairs_P` int32; `tiles_3N` int32: expert (or -1), start and count of every tile."""

    pairs_P: Tensor
    tiles_3N: Tensor


def slots_for(pairs: int, experts: int, tile_pairs: int) -> int:
    """Most tiles that `pairs` pairs can make: one per group, and one per full tile of the rest."""
    groups = min(pairs, experts + 1)
    return groups + (pairs - groups) // tile_pairs


def expert_order_ref(
    ids_TA: Tensor, experts: int, first_expert: int, tile_pairs: int
) -> ExpertOrder:
    """The formula above in PyTorch."""
    ids = ids_TA.flatten().long() - first_expert
    groups = torch.where((ids >= 0) & (ids < experts), ids, experts)
    counts = torch.bincount(groups, minlength=experts + 1).tolist()
    slots, start = slots_for(len(ids), experts, tile_pairs), 0
    tiles = []
    for group, count in enumerate(counts):
        expert = group if group < experts else -1
        for first in range(0, count, tile_pairs):
            tiles.append([expert, start + first, min(tile_pairs, count - first)])
        start += count
    tiles += [[-1, 0, 0]] * (slots - len(tiles))
    tiles_3N = torch.tensor(tiles, dtype=torch.int32, device=ids.device).view(slots, 3).t()
    return ExpertOrder(groups.argsort(stable=True).int(), tiles_3N.contiguous())


@triton.jit
def _groups_of(ids_ptr, p, P, E, first_expert):
    """0 to E - 1 for the experts here, E for all others, E + 1 behind the last pair."""
    group = tl.load(ids_ptr + p, mask=p < P, other=0) - first_expert
    group = tl.where((group >= 0) & (group < E), group, E)
    return tl.where(p < P, group, E + 1)


@triton.jit(do_not_specialize=["P", "first_expert", "slots", "tile"])
def _expert_order_kernel(
    ids_ptr,  # [P]
    pairs_ptr,  # [P]
    tiles_ptr,  # [3, slots]
    P,
    E,
    first_expert,
    slots,
    tile,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    own = tl.program_id(0)
    lane, group = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, P, BLOCK_P):
        counts += tl.histogram(_groups_of(ids_ptr, start + lane, P, E, first_expert), BLOCK_E)
    first = tl.sum(tl.where(group < own, counts, 0), axis=0)
    count = tl.sum(tl.where(group == own, counts, 0), axis=0)
    at = first
    for start in range(0, P, BLOCK_P):
        mine = _groups_of(ids_ptr, start + lane, P, E, first_expert) == own
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(pairs_ptr + at + rank - 1, start + lane, mask=mine)
        at += tl.max(rank, axis=0)
    tiles = (counts + tile - 1) // tile
    slot = tl.sum(tl.where(group < own, tiles, 0), axis=0)
    end = slot + (count + tile - 1) // tile
    expert = tl.where(own < E, own, ELSEWHERE)
    for start in range(0, end - slot, BLOCK_P):
        i = start + lane
        _store_tiles(
            tiles_ptr, slots, slot + i, end, expert, first + i * tile, count - i * tile, tile
        )
    for start in range(tl.where(own == E, end, slots), slots, BLOCK_P):
        zero = lane * 0
        _store_tiles(tiles_ptr, slots, start + lane, slots, ELSEWHERE, zero, zero, tile)


@triton.jit
def _store_tiles(tiles_ptr, slots, slot, end, expert, first, count, tile):
    inside = slot < end
    tl.store(tiles_ptr + slot, expert, mask=inside)
    tl.store(tiles_ptr + slots + slot, first, mask=inside)
    tl.store(tiles_ptr + 2 * slots + slot, tl.minimum(count, tile), mask=inside)


@dataclass(frozen=True)
class LaunchConfig:
    """One program per expert and one for all others reads `BLOCK_P` ids at a time."""

    BLOCK_P: int
    BLOCK_E: int
    num_warps: int


def _launch_config(pairs: int, experts: int) -> LaunchConfig:
    """At most 1024 ids at a time. Chosen by shape; not yet measured on a GPU."""
    block = min(1024, max(32, triton.next_power_of_2(pairs)))
    bins = max(32, triton.next_power_of_2(experts + 2))
    return LaunchConfig(block, bins, num_warps=4 if block > 256 else 1)


def order_into(
    ids: Tensor, pairs: Tensor, tiles: Tensor, experts: int, first_expert: int, tile_pairs: int
) -> None:
    """Launches the kernel; P must be at least 1."""
    config = _launch_config(ids.numel(), experts)
    _expert_order_kernel[(experts + 1,)](
        ids,
        pairs,
        tiles,
        ids.numel(),
        experts,
        first_expert,
        tiles.shape[1],
        tile_pairs,
        BLOCK_P=config.BLOCK_P,
        BLOCK_E=config.BLOCK_E,
        num_warps=config.num_warps,
    )


@torch.library.custom_op("aerie::expert_order", mutates_args=())
def _expert_order_op(
    ids: Tensor, experts: int, first_expert: int, tile_pairs: int
) -> tuple[Tensor, Tensor]:
    check_launchable(ids)
    pairs = ids.new_empty(ids.numel())
    tiles = ids.new_empty((3, slots_for(ids.numel(), experts, tile_pairs)))
    if ids.numel() > 0:
        order_into(ids, pairs, tiles, experts, first_expert, tile_pairs)
    return pairs, tiles


@_expert_order_op.register_fake
def _(ids: Tensor, experts: int, first_expert: int, tile_pairs: int) -> tuple[Tensor, Tensor]:
    pairs = ids.numel()
    groups = torch.sym_min(pairs, experts + 1)
    slots = groups + (pairs - groups) // tile_pairs
    tiles = ids.new_empty((3, slots))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return ids.new_empty(pairs), tiles


def expert_order(
    ids_TA: Tensor, experts: int, first_expert: int = 0, tile_pairs: int = 64
) -> ExpertOrder:
    """Sorts the pairs of `ids_TA` (int32, contiguous) by expert and cuts them into tiles.

    Raises ValueError on a count, shape, dtype or layout the kernel would read wrongly.
    """
    if ids_TA.ndim != 2 or ids_TA.dtype != torch.int32 or not ids_TA.is_contiguous():
        raise ValueError(
            f"ids_TA: must be a contiguous int32 [T, A], got {ids_TA.dtype} "
            f"{tuple(ids_TA.shape)} strides {ids_TA.stride()}"
        )
    check_pairs("ids_TA", ids_TA.numel(), experts, first_expert)
    if tile_pairs < 1:
        raise ValueError(f"tile_pairs: must be at least 1, got {tile_pairs}")
    return ExpertOrder(*_expert_order_op(ids_TA, experts, first_expert, tile_pairs))


def check_pairs(name: str, pairs: int, experts: int, first_expert: int) -> None:
    """Raises ValueError where the kernel's counters or its time would run away."""
    if pairs > MAX_PAIRS:
        raise ValueError(f"{name}: must hold at most {MAX_PAIRS} pairs, got {pairs}; cut the step")
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"experts: must be 1 to {MAX_EXPERTS}, got {experts}")
    if not 0 <= first_expert < 2**30:
        raise ValueError(f"first_expert: must be at least 0 and below 2^30, got {first_expert}")
