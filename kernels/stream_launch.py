"""The host side of `weight_stream`: launch rule, scratch, and the checks of a streamed weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from aerie.kernels.arrivals import arrival_counters
from aerie.kernels.backend import DTYPES
from aerie.kernels.read_ahead import read_ahead
from aerie.kernels.target import Target, lacks_fp8

FP8 = torch.float8_e4m3fn
SCALE_BLOCK = 128  # rows and columns of a weight that share one scale, in the block format
SMS = 132  # of an H100 or H200; other GPUs get a slightly worse split, never a wrong result
FILL = 8  # steps of depth that starting and draining a pipeline costs, an estimate

MIN_SHARE = 4  # steps of a share below which its partial weighs as much as its weights


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of the output, depth of one step, and shares that every segment's depth is cut into.

    `SPLIT` says whether a program does one share of one segment or all of the depth.
    """

    BLOCK_F: int
    BLOCK_T: int
    BLOCK_D: int
    PARTS: int
    SPLIT: bool
    num_warps: int
    num_stages: int


def stream_config(
    target: Target,
    rows: int,
    features: int,
    depth: int,
    segments: int,
    itemsize: int,
    weight_itemsize: int,
    through_registers: bool = False,
) -> LaunchConfig:
    """Tiles by what an SM must keep in flight, splits by what fills the GPU.

    HBM needs about 33 KB in flight per SM (4.3 TB/s x 1 us / 132), and 64 KB leave room. Up to 64
    rows, a step of 64 weight rows x 128 columns is 16 KB (FP8: 8 KB), and two programs share an
    SM: three steps outstanding are 96 KB, two are 64 KB (FP8: five are 80 KB, three 48 KB). More
    rows are bound by arithmetic: 128 x 128. float32 has no tensor cores here, so its tiles are
    small; `through_registers` says that rows are added or normed on their way, which takes room.
    Registers: with "mma" 64 rows take eight warps; with "tcgen05" 64 rows of FP8 take half of the
    depth, and a prompt one step more in flight, behind which fewer values wait in registers.
    Computed from shapes and compiled without spills; not yet measured on a GPU.
    """
    wide, is_fp8 = rows > 64 and itemsize == 2, weight_itemsize == 1
    block_f, per_sm = (128, 1) if wide else (64, 2)
    block_t = min(128 if wide and not through_registers else 64, triton.next_power_of_2(rows))
    block_t = max(16, block_t)
    if itemsize == 4:
        block_d, stages = 32, 4
    elif wide:
        block_d, stages = 64, 4 if target.unit == "tcgen05" else 3
    elif target.unit == "tcgen05" and is_fp8 and block_t == 64:
        block_d, stages = 64, 6
    else:
        block_d = 64 if through_registers and block_t > 16 else 128
        stages = (
            (6 if block_t < 64 else 4)
            if is_fp8
            else (4 if block_t < 32 or through_registers else 3)
        )
    widest = 16 if itemsize == 4 else 32 if target.unit == "mma" else 64  # of four warps
    warps = 8 if wide or block_t > widest else 4
    programs = triton.cdiv(features, block_f) * triton.cdiv(rows, block_t)
    splits = _splits(programs, triton.cdiv(depth, block_d), segments, per_sm * SMS)
    parts, split = max(1, splits // segments), splits > 1
    stages = min(stages, target.most_stages)
    return LaunchConfig(block_f, block_t, block_d, parts, split, warps, stages)


def _splits(programs: int, steps: int, segments: int, slots: int) -> int:
    """Programs per tile, 1 or a multiple of `segments`, that finish first in waves of `slots`."""
    if not 0 < programs < slots or steps == 0:
        return 1
    parts = range(1, max(1, steps // MIN_SHARE) + 1)

    def time(splits: int) -> int:
        waves = triton.cdiv(programs * splits, slots)
        return waves * (triton.cdiv(segments * steps, splits) + FILL)

    return min([1, *(segments * part for part in parts)], key=time)


def split_scratch(
    x: Tensor, config: LaunchConfig, grid: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Partials of every program of `grid` and one arrival counter per tile; unread without a split.

    A split has fewer tiles than there are counters.
    """
    if not config.SPLIT:
        return x, x
    f_tiles, t_tiles, splits = grid[1], grid[0], grid[2]
    size = f_tiles * t_tiles * splits * (config.BLOCK_F + 1) * config.BLOCK_T
    return x.new_empty(size, dtype=torch.float32), arrival_counters(x, 2 * SMS)


def projected(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, scale: Tensor | None):
    """`x W^T + b` in PyTorch; an FP8 weight is widened and scaled first."""
    if scale is None:
        read_ahead(weight_FD)
        return F.linear(x_TD, weight_FD, bias_F)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    weight = weight_FD.to(wide) * scale_of_weights(scale, weight_FD).to(wide)
    bias = None if bias_F is None else bias_F.to(wide)
    return F.linear(x_TD.to(wide), weight, bias).to(x_TD.dtype)


def scale_of_weights(scale: Tensor, weight_FD: Tensor) -> Tensor:
    """`scale` ([F], [1], or one per block of 128 x 128) in a shape that multiplies `weight_FD`."""
    if scale.ndim == 1:
        return scale[:, None]
    rows, columns = weight_FD.shape
    by_row = scale.repeat_interleave(SCALE_BLOCK, dim=0)[:rows]
    return by_row.repeat_interleave(SCALE_BLOCK, dim=1)[:, :columns]


def scale_stride(scale: Tensor | None) -> int:
    """Between the scales of two rows of a weight (heads of a cache, rows of blocks); 0 if one."""
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)


def scale_mode(scale: Tensor | None) -> int:
    """As the kernels name it: NO_SCALE, ROW_SCALE or BLOCK_SCALE."""
    return 0 if scale is None else scale.ndim


def streamed(weight: Tensor, depth: int) -> Tensor:
    """FP8 weights as int16, two to an element (`weight_stream`), where no pair of columns is cut.

    `depth` is that of a segment.
    """
    is_even = depth % 2 == weight.stride(0) % 2 == weight.storage_offset() % 2 == 0
    return weight.view(torch.int16) if weight.dtype == FP8 and is_even else weight


def check_rows(name: str, x: Tensor) -> None:
    """Raises ValueError unless `x` is [T, D] of a dtype and layout the K loop reads."""
    if x.ndim != 2 or x.stride(-1) != 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"{name}: must be float32, float16 or bfloat16, two-dimensional, with a contiguous "
            f"last dimension, got {x.dtype} {tuple(x.shape)} {x.stride()}"
        )


def check_segments(name: str, segments: Sequence[Tensor], like: Tensor) -> None:
    """Raises ValueError unless all of `segments` pass `check_rows` and match `like`."""
    for i, x in enumerate(segments):
        check_rows(f"{name}[{i}]", x)
        if x.shape != like.shape or x.dtype != like.dtype:
            raise ValueError(
                f"{name}[{i}]: must be {tuple(like.shape)} {like.dtype} as taps[0], "
                f"got {tuple(x.shape)} {x.dtype}"
            )
        check_device(f"{name}[{i}]", x, like)


def check_weight(
    name: str,
    weight: Tensor,
    columns: int,
    like: Tensor,
    scale: Tensor | None,
    scale_name: str,
    segments: int = 1,
) -> None:
    """Raises ValueError unless `weight` is [F, columns] in `like`'s dtype, or FP8 with a scale.

    Blocks of scales may not reach from one of the `segments` of the columns into another.
    """
    if weight.ndim != 2 or weight.stride(-1) != 1 or weight.dtype not in (like.dtype, FP8):
        raise ValueError(
            f"{name}: must be {like.dtype} or {FP8}, two-dimensional, with a contiguous last "
            f"dimension, got {weight.dtype} {tuple(weight.shape)} {weight.stride()}"
        )
    if weight.shape[1] != columns:
        raise ValueError(f"{name}: must be [F, {columns}], got {tuple(weight.shape)}")
    check_device(name, weight, like)
    if (weight.dtype == FP8) != (scale is not None):
        given = "none" if scale is None else "one"
        raise ValueError(
            f"{scale_name}: must be given with FP8 weights and only then, got {given} "
            f"for {weight.dtype}"
        )
    if scale is not None:
        _check_scale(scale_name, scale, weight, segments)
    capability = lacks_fp8(weight) if weight.dtype == FP8 else None
    if capability is not None:
        raise ValueError(f"{name}: FP8 needs CUDA capability 8.9 or later, got {capability}")


def _check_scale(name: str, scale: Tensor, weight: Tensor, segments: int) -> None:
    rows, columns = weight.shape
    blocks = (triton.cdiv(rows, SCALE_BLOCK), triton.cdiv(columns, SCALE_BLOCK))
    is_known = tuple(scale.shape) in [(rows,), (1,), blocks]
    if not is_known or not scale.is_contiguous() or scale.dtype != torch.float32:
        raise ValueError(
            f"{name}: must be a contiguous [{rows}] or [1] or {list(blocks)} of torch.float32, "
            f"got {tuple(scale.shape)} {scale.dtype} {scale.stride()}"
        )
    if scale.ndim == 2 and segments > 1 and columns // segments % SCALE_BLOCK:
        raise ValueError(
            f"{name}: blocks of {SCALE_BLOCK} columns must not reach from one input into the next, "
            f"which are {columns // segments} wide: use a scale per row"
        )
    check_device(name, scale, weight)


def check_vector(
    name: str,
    vector: Tensor | None,
    size: int,
    like: Tensor,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Raises ValueError unless `vector` is None or a contiguous [size]."""
    if vector is None:
        return
    if vector.shape != (size,) or not vector.is_contiguous() or vector.dtype not in dtypes:
        raise ValueError(
            f"{name}: must be a contiguous [{size}] of {' or '.join(map(str, dtypes))}, "
            f"got {tuple(vector.shape)} {vector.dtype} {vector.stride()}"
        )
    check_device(name, vector, like)


def check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: must be on {like.device} like the rows, got {tensor.device}")
