"""Sampling without a softmax, a sort or a state: one token per row by Gumbel's rule.

    score_v = (logits_v - maximum) * scale + gumbel(seed, position, v)      for the v the row keeps
    id      = min { v : score_v = max(score) },   -1 if the row is not legal

Adding Gumbel noise to log-probabilities and taking the largest draws from them exactly (Maddison et
al. 2014), so the mass of the row is never needed. `row_filter` says what a row keeps
and what temperature it has, and marks by a NaN maximum a row with NaN or +inf or of nothing but
-inf. A greedy row keeps one token, so noise cannot change it. The noise (`gumbel`) is keyed by the
absolute position of the drawn token: the draw of a position is the same in a tree, a chain or a
batch.

Every block of 4096 ids is a program of its own and leaves its best as one sortable key; a second
kernel takes the best of these. The choice does not depend on the cut, nor on one between several
GPUs: `draw_keys` gives the best key of columns `first` .. of a row, and the largest of all is the
row's.

Letters: T rows, V target vocabulary.
"""

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels import choice_key as choice
from aerie.kernels.backend import check_launchable, widened
from aerie.kernels.draft_vocab_merge import NO_KEY, key_id, sort_key
from aerie.kernels.gumbel import BLOCK, QUARTER, block_words, gumbel_ref, words_to_gumbel
from aerie.kernels.row_filter import RowFilter
from aerie.kernels.stream_launch import DTYPES, check_vector


def draw_ref(
    logits_TV: Tensor, row_filter: RowFilter, seeds_T: Tensor, positions_T: Tensor
) -> Tensor:
    """The rule above in PyTorch, whose `max` takes the first of equals."""
    _, drawn_T = _scores_ref(logits_TV, row_filter, seeds_T, positions_T, 0).max(dim=-1)
    return drawn_T.masked_fill_(row_filter.maximum_T.isnan(), -1)


def draw_keys_ref(
    logits_TV: Tensor, row_filter: RowFilter, seeds_T: Tensor, positions_T: Tensor, first: int
) -> Tensor:
    """The best key of columns `first` .. in PyTorch."""
    score_TV = _scores_ref(logits_TV, row_filter, seeds_T, positions_T, first)
    best_T, column_T = score_TV.max(dim=-1)
    is_none_T = (best_T == -torch.inf) | row_filter.maximum_T.isnan()
    return choice.choice_key(best_T, column_T + first).masked_fill_(is_none_T, choice.NO_KEY)


def _scores_ref(
    logits_TV: Tensor, row_filter: RowFilter, seeds_T: Tensor, positions_T: Tensor, first: int
) -> Tensor:
    x_TV, width = widened(logits_TV), logits_TV.shape[1]
    columns = [getattr(row_filter, field.name)[:, None] for field in fields(row_filter)]
    maximum_T1, scale_T1, threshold_T1, last_id_T1, _ = columns
    ids_V = torch.arange(first, first + width, device=x_TV.device)
    is_kept_TV = (x_TV > threshold_T1) | ((x_TV == threshold_T1) & (ids_V <= last_id_T1))
    noise_TV = gumbel_ref(seeds_T, positions_T, width, first)
    score_TV = (x_TV - maximum_T1) * scale_T1 + noise_TV
    return score_TV.masked_fill_(~is_kept_TV, -torch.inf)


@triton.jit
def _draw_kernel(
    logits_ptr,  # [T, V], columns first .. of a row
    maximum_ptr,  # [T], as the five below
    scale_ptr,
    threshold_ptr,
    last_id_ptr,
    seeds_ptr,
    positions_ptr,
    keys_ptr,  # [T, blocks], the best of every block
    stride_lt,
    first,
    V,
):
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1) + first // BLOCK
    maximum, scale = tl.load(maximum_ptr + t), tl.load(scale_ptr + t)
    threshold, last_id = tl.load(threshold_ptr + t), tl.load(last_id_ptr + t)
    words = block_words(tl.load(seeds_ptr + t), tl.load(positions_ptr + t), block)
    best = tl.full([QUARTER], NO_KEY, tl.int64)
    for quarter in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        v = block * BLOCK + quarter * QUARTER + tl.arange(0, QUARTER)
        column = v - first
        in_row = (column >= 0) & (column < V)
        logits = tl.load(logits_ptr + t * stride_lt + column, mask=in_row, other=0.0).to(tl.float32)
        is_kept = (logits > threshold) | ((logits == threshold) & (v <= last_id))
        score = (logits - maximum) * scale + words_to_gumbel(words[quarter])
        key = tl.where(is_kept & in_row, sort_key(score, v), NO_KEY)
        best = tl.maximum(best, key)
    tl.store(keys_ptr + t * tl.num_programs(1) + tl.program_id(1), tl.max(best, axis=0))


@triton.jit
def _draw_merge_kernel(
    keys_ptr,  # [T, blocks]
    maximum_ptr,  # [T]
    drawn_ptr,  # [T], ids or keys
    num_blocks,
    AS_KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    keys = tl.load(keys_ptr + t * num_blocks + n, mask=n < num_blocks, other=NO_KEY)
    maximum = tl.load(maximum_ptr + t)
    best = tl.max(keys, axis=0)
    drawn = best if AS_KEYS else key_id(best).to(tl.int64)
    tl.store(drawn_ptr + t, tl.where(maximum == maximum, drawn, NO_KEY if AS_KEYS else -1))


@dataclass(frozen=True)
class LaunchConfig:
    """Programs per row, the warps of each, and the lanes of the merge that cover them."""

    blocks: int
    num_warps: int
    BLOCK_N: int


def _launch_config(width: int, first: int = 0) -> LaunchConfig:
    """A block is what 1024 counters give noise for: 32 ids per thread. Not measured on a GPU."""
    blocks = triton.cdiv(first + width, BLOCK.value) - first // BLOCK.value
    return LaunchConfig(blocks, num_warps=4, BLOCK_N=triton.next_power_of_2(blocks))


@torch.library.custom_op("aerie::draw", mutates_args=())
def _draw_op(
    logits: Tensor,
    maximum: Tensor,
    scale: Tensor,
    threshold: Tensor,
    last_id: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first: int = 0,
    as_keys: bool = False,
) -> Tensor:
    check_launchable(logits)
    rows, width = logits.shape
    config = _launch_config(width, first)
    keys, ids = seeds.new_empty(rows, config.blocks), seeds.new_empty(rows)
    if rows > 0:
        _draw_kernel[(rows, config.blocks)](  # CUDA takes 65535 in the second place
            logits,
            maximum,
            scale,
            threshold,
            last_id,
            seeds,
            positions,
            keys,
            logits.stride(0),
            first,
            width,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
        _draw_merge_kernel[(rows,)](
            keys,
            maximum,
            ids,
            config.blocks,
            AS_KEYS=as_keys,
            BLOCK_N=config.BLOCK_N,
            num_warps=1,
        )
    return ids


@_draw_op.register_fake
def _(logits: Tensor, maximum: Tensor, scale: Tensor, threshold: Tensor, last_id: Tensor,
      seeds: Tensor, positions: Tensor, first: int = 0,
      as_keys: bool = False) -> Tensor:  # fmt: skip
    return seeds.new_empty(logits.shape[0])


def draw(logits_TV: Tensor, row_filter: RowFilter, seeds_T: Tensor, positions_T: Tensor) -> Tensor:
    """One token id per row, [T] int64; -1 for a row that is not legal.

    `positions_T` (int64) are those of the tokens to be drawn, `seeds_T` (int64) any numbers.
    Raises ValueError on a shape, dtype, device or layout the kernel would read wrongly.
    """
    return _draw_op(*_checked(logits_TV, row_filter, seeds_T, positions_T))


def draw_keys(
    logits_TV: Tensor, row_filter: RowFilter, seeds_T: Tensor, positions_T: Tensor, first: int
) -> Tensor:
    """The best key (`choice_key`) of columns `first` .. of every row, [T] int64; NO_KEY where the
    row is not legal or keeps none of them. `row_filter` has the ids and maximum of whole rows.

    Raises ValueError as `draw`.
    """
    if first < 0:
        raise ValueError(f"first: must be the id of the first column, got {first}")
    return _draw_op(*_checked(logits_TV, row_filter, seeds_T, positions_T), first, True)


def _checked(
    logits_TV: Tensor, row_filter: RowFilter, seeds_T: Tensor, positions_T: Tensor
) -> tuple[Tensor, ...]:
    x = logits_TV
    if x.ndim != 2 or x.shape[1] == 0 or x.stride(-1) != 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"logits_TV: must be float32, float16 or bfloat16 [T, V], V > 0, with a contiguous "
            f"last dimension, got {x.dtype} {tuple(x.shape)} {x.stride()}"
        )
    for field in fields(row_filter):
        dtype = torch.int32 if field.name == "last_id_T" else torch.float32
        column = getattr(row_filter, field.name)
        check_vector(f"row_filter.{field.name}", column, x.shape[0], x, (dtype,))
    check_vector("seeds_T", seeds_T, x.shape[0], x, (torch.int64,))
    check_vector("positions_T", positions_T, x.shape[0], x, (torch.int64,))
    kept = row_filter
    columns = kept.maximum_T, kept.scale_T, kept.threshold_T, kept.last_id_T
    return (x, *columns, seeds_T, positions_T)
