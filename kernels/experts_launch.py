"""The host side of `experts`: launch rules and what the launches share.

    few pairs (at most 64)   one tile per distinct expert, its weights read once; split depth
    more                     tiles of 64 or 128 pairs, neighbours in time share weights in L2

All choices are functions of shapes. Computed from them and compiled without spills; not yet
measured on a GPU.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aerie.kernels.arrivals import arrival_counters
from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.expert_order import slots_for
from aerie.kernels.target import Target

FEW_PAIRS = 64
SMS = 132  # of an H100 or H200; other GPUs get a slightly worse split, never a wrong result
PER_SM = 2  # programs that share an SM while pairs are few
MIN_SHARE = 4  # steps of a share below which its partial weighs as much as its weights
MOST_TILES = 4096  # that may be split, hence counters


@dataclass(frozen=True)
class ProductConfig:
    """Tile of weight rows and pairs, depth of a step, shares of it, slots that walk together.

    A tile has at most `BLOCK_T` pairs, or at most `WIDE_T` in a branch of its own.
    """

    BLOCK_N: int
    BLOCK_T: int
    WIDE_T: int
    BLOCK_K: int
    SPLITS: int
    GROUP_SLOTS: int
    num_warps: int
    num_stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if name.isupper()}


@dataclass(frozen=True)
class LaunchConfig:
    """Pairs of a tile, and both products."""

    tile_pairs: int
    gate_up: ProductConfig
    down: ProductConfig


@dataclass(frozen=True)
class Call:
    """What the launches of one call read."""

    ids: Tensor
    scores: Tensor
    first_expert: int
    pairs: Tensor
    tiles: Tensor
    config: LaunchConfig


def is_few(pairs: int) -> bool:
    """Whether a step streams weights (one tile per expert) rather than computes (grouped tiles).

    At 64 pairs the widest tile, 64 columns of FP8, computes for a third of the time its weights
    take to arrive; a second tile of one expert would read them again.
    """
    return pairs <= FEW_PAIRS


def tile_pairs(
    target: Target, pairs: int, experts: int, is_fp8: bool, is_blocked: bool = False
) -> int:
    """Most pairs of one tile: all that there are, or 64 until experts have more on average.

    With FP8 weights 64 at most: 256 rows of gate and up times 128 pairs spill registers. Blackwell
    reads sums back into registers, of which block scales need a second set: 32 there, so that the
    rare expert with more of a small step reads its weights twice.
    """
    widest = 32 if is_blocked and target.unit == "tcgen05" else 64
    if is_few(pairs):
        return max(16, min(widest, triton.next_power_of_2(pairs)))
    return widest if is_fp8 or pairs <= 64 * experts else 128


def distinct_experts(pairs: int, experts: int) -> float:
    """Expected number of different experts of `pairs` independent uniform choices."""
    return experts * (1 - (1 - 1 / experts) ** pairs)


def product_config(
    target: Target,
    pairs: int,
    experts: int,
    outputs: int,
    depth: int,
    itemsize: int,
    is_fp8: bool,
    has_gate: bool,
    is_blocked: bool = False,
) -> ProductConfig:
    """Tiles by what an SM must keep in flight (64 KB or more), splits by what fills the GPU.

    FP8 gate and up take 256 weight rows, so that one program has 128 columns behind SwiGLU, which
    share a scale. A step of it is 32 KB, and two programs with two outstanding steps each keep
    128 KB in flight. Steps of half the depth where registers are few: beside 64 columns, with block
    scales on Blackwell, and on AMD, where e4m3 is emulated. 128 rows of the other products are
    16 KB, three or four outstanding. float32 has no tensor cores here, so its tiles are small.
    """
    most, few = tile_pairs(target, pairs, experts, is_fp8, is_blocked), is_few(pairs)
    block_t = 16 if few else most
    if itemsize == 4 and not is_fp8:
        block_n, block_k, warps, stages = 64, 32, 4, 3
    elif not is_fp8:
        block_n, block_k, warps, stages = 128, 64, 4 if few else 8, 4
    elif has_gate:
        block_n, warps = 256, 8
        reads_back = is_blocked and target.unit == "tcgen05"
        is_short = (few and most == 64) or reads_back or target.unit == "mfma"
        block_k, stages = (64, 5) if is_short else (128, 3)
    else:
        block_n, block_k = 128, 128
        warps, stages = (4, 5) if most <= 32 else (8, 4)
    tiles = triton.cdiv(outputs, block_n)
    steps, slots = triton.cdiv(depth, block_k), slots_for(pairs, experts, most)
    splits = _splits(pairs, experts, tiles, steps, slots) if few else 1
    return ProductConfig(
        block_n,
        block_t,
        most,
        block_k,
        splits,
        1 if few else 8,
        warps,
        min(stages, target.most_stages),
    )


def _splits(pairs: int, experts: int, tiles: int, steps: int, slots: int) -> int:
    """Shares of the depth that fill the GPU once, as far as each keeps a few steps."""
    programs = distinct_experts(pairs, experts) * tiles
    if slots * tiles > MOST_TILES:
        return 1
    return max(1, min(int(PER_SM * SMS / programs), steps // MIN_SHARE))


def scale_strides(matrix: ExpertMatrix) -> tuple[int, int]:
    """Steps from expert to expert and from row (or block of rows) to row of the weight's scale."""
    if matrix.scale is None:
        return 0, 0
    return matrix.scale.stride(0), matrix.scale.stride(1) if matrix.scale.shape[1] > 1 else 0


def split_scratch(
    like: Tensor, slots: int, tiles: int, config: ProductConfig
) -> tuple[Tensor, Tensor]:
    """Partials of every program and one arrival counter per tile; unread without a split."""
    if config.SPLITS == 1:
        return like, like
    size = slots * tiles * config.SPLITS * config.WIDE_T * config.BLOCK_N
    return like.new_empty(size, dtype=torch.float32), arrival_counters(like, MOST_TILES)
