"""Draft head: the k likeliest tokens of every row over the reduced vocabulary, in one pass.

    x = round(hidden @ head^T)                       [T, U], rounded to the dtype as lm_head does
    logsumexp = log sum_u exp(x_u)                   logprob_u = x_u - logsumexp
    ids, logprobs = the k largest, falling;          target id = u + d2t[u]

Ties go to the lowest draft id. `d2t` holds OFFSETS (EAGLE-3 checkpoints), not ids; without it the
draft vocabulary is the target's. The kernel streams over tiles of the vocabulary and keeps of each
only its maximum, its sum of exponentials and its own k best; a second, small kernel merges the
tiles. Neither [T, U] logits nor a [T, V] row of target logits exists at any time. The head tile is
the left operand of the product, as in `linear`; sums are float32. A row with a NaN yields NaN log-
probabilities beside ids that are merely legal.

Letters: T rows, D hidden, U draft vocabulary, A the k kept.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable

MAX_K = 16
NO_ID = tl.constexpr(2**31 - 1)  # above every id


@dataclass(frozen=True)
class DraftTokens:
    """The k likeliest draft tokens of every row, likeliest first."""

    ids_TA: Tensor  # int64, ids of the TARGET vocabulary
    logprobs_TA: Tensor  # float32, over the draft vocabulary
    logsumexp_T: Tensor  # float32, of the draft logits


def draft_vocab_ref(
    hidden_TD: Tensor, head_UD: Tensor, d2t_U: Tensor | None, k: int
) -> DraftTokens:
    """The formulas above in PyTorch, with all logits at once."""
    logits_TU = F.linear(hidden_TD, head_UD).float()
    logsumexp_T = logits_TU.logsumexp(dim=-1)
    if k == 1:
        kept_TA, ids_TA = logits_TU.max(dim=-1, keepdim=True)
    else:
        sorted_TU, order_TU = logits_TU.sort(dim=-1, descending=True, stable=True)
        kept_TA, ids_TA = sorted_TU[:, :k], order_TU[:, :k]
    if d2t_U is not None:
        ids_TA = ids_TA + d2t_U[ids_TA]
    return DraftTokens(ids_TA, kept_TA - logsumexp_T[:, None], logsumexp_T)


@triton.jit
def _next_best(values, ids, last, last_id):
    """Largest value and its lowest id after (last, last_id) in falling order; NaN never comes."""
    is_after = (values < last) | ((values == last) & (ids > last_id))
    best = tl.max(tl.where(is_after, values, -float("inf")), axis=0, keep_dims=True)
    best_id = tl.min(tl.where(is_after & (values == best), ids, NO_ID), axis=0, keep_dims=True)
    return best, best_id


@triton.jit(do_not_specialize=["T"])
def _draft_vocab_kernel(
    hidden_ptr,  # [T, D]
    head_ptr,  # [U, D]
    sums_ptr,  # [T, tiles, 2], maximum and sum of exponentials
    best_ptr,  # [T, tiles, A], logits
    best_id_ptr,  # [T, tiles, A]
    stride_ht,
    stride_wu,
    T,
    D,
    U,
    A: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    in_head, is_row = u < U, t < T
    head_row_ptr, hidden_row_ptr = head_ptr + u.to(tl.int64) * stride_wu, hidden_ptr + t * stride_ht
    logits = tl.zeros([BLOCK_U, BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        head_mask, hidden_mask = in_head & (d < D)[None, :], is_row & (d < D)[:, None]
        head = tl.load(head_row_ptr + d[None, :], mask=head_mask, other=0.0)
        hidden = tl.load(hidden_row_ptr + d[:, None], mask=hidden_mask, other=0.0)
        logits = tl.dot(head, hidden, logits, input_precision="ieee")
    logits = logits.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    logits = tl.where(in_head, logits, -float("inf"))

    tile = t * tl.num_programs(0) + tl.program_id(0)
    maximum = tl.max(logits, axis=0, keep_dims=True)
    # a tile of nothing but -inf: -inf - -inf would be NaN
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    tl.store(sums_ptr + tile * 2, maximum, mask=is_row)
    total = tl.sum(tl.exp(logits - shift), axis=0, keep_dims=True)
    tl.store(sums_ptr + tile * 2 + 1, total, mask=is_row)
    ids = tl.where(in_head, u, NO_ID)
    best = tl.full([1, BLOCK_T], float("inf"), tl.float32)
    best_id = tl.full([1, BLOCK_T], -1, tl.int32)
    for a in range(0, A):
        best, best_id = _next_best(logits, ids, best, best_id)
        tl.store(best_ptr + tile * A + a, best, mask=is_row)
        tl.store(best_id_ptr + tile * A + a, best_id, mask=is_row)


@triton.jit
def _draft_vocab_merge_kernel(
    sums_ptr,  # [T, tiles, 2]
    best_ptr,  # [T, tiles, A]
    best_id_ptr,  # [T, tiles, A]
    d2t_ptr,  # [U], read if HAS_MAP
    ids_ptr,  # [T, A]
    logprobs_ptr,  # [T, A]
    logsumexp_ptr,  # [T]
    num_tiles,
    U,
    A: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    lane_maximum = tl.full([BLOCK_N], -float("inf"), tl.float32)
    lane_total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, num_tiles, BLOCK_N):
        is_tile = start + n < num_tiles
        sums = sums_ptr + (t * num_tiles + start + n) * 2
        tile_maximum = tl.load(sums, mask=is_tile, other=-float("inf"))
        tile_total = tl.load(sums + 1, mask=is_tile, other=0.0)
        maximum = tl.maximum(lane_maximum, tile_maximum)
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)
        lane_total *= tl.exp(lane_maximum - shift)
        lane_total += tile_total * tl.exp(tile_maximum - shift)
        lane_maximum = maximum
    maximum = tl.max(lane_maximum, axis=0)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    logsumexp = tl.log(tl.sum(lane_total * tl.exp(lane_maximum - shift), axis=0)) + shift
    tl.store(logsumexp_ptr + t, logsumexp)

    num_candidates = num_tiles * A
    last, last_id = tl.full([1], float("inf"), tl.float32), tl.full([1], -1, tl.int32)
    for a in range(0, A):
        lane_best = tl.full([BLOCK_N], -float("inf"), tl.float32)
        lane_id = tl.full([BLOCK_N], NO_ID, tl.int32)
        for start in range(0, num_candidates, BLOCK_N):
            candidate = t * num_candidates + start + n
            is_candidate = start + n < num_candidates
            value = tl.load(best_ptr + candidate, mask=is_candidate, other=-float("inf"))
            u = tl.load(best_id_ptr + candidate, mask=is_candidate, other=NO_ID)
            is_after = (value < last) | ((value == last) & (u > last_id))
            is_better = is_after & ((value > lane_best) | ((value == lane_best) & (u < lane_id)))
            lane_best = tl.where(is_better, value, lane_best)
            lane_id = tl.where(is_better, u, lane_id)
        last, last_id = _next_best(lane_best, lane_id, last, last_id)
        one = tl.arange(0, 1)
        draft_id = tl.minimum(last_id, U - 1).to(tl.int64)  # a NaN row runs out of candidates
        offset = tl.load(d2t_ptr + draft_id) if HAS_MAP else 0
        tl.store(ids_ptr + t * A + a + one, draft_id + offset)
        tl.store(logprobs_ptr + t * A + a + one, last - logsumexp)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of draft ids by rows by depth, and the lanes of the merge."""

    BLOCK_U: int
    BLOCK_T: int
    BLOCK_D: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def _launch_config(rows: int, vocabulary: int, k: int, itemsize: int) -> LaunchConfig:
    """64 head rows, 16 to 64 columns, 128 bytes of depth: the head is read once up to 64 rows.

    Chosen by shape, as in `linear`; not yet measured on a GPU.
    """
    block_u, block_t = 64, min(64, max(16, triton.next_power_of_2(rows)))
    candidates = triton.next_power_of_2(triton.cdiv(vocabulary, block_u) * k)
    return LaunchConfig(
        block_u, block_t, 128 // itemsize, min(2048, candidates), num_warps=4, num_stages=4
    )


@torch.library.custom_op("aerie::draft_vocab", mutates_args=())
def _draft_vocab_op(
    hidden: Tensor, head: Tensor, d2t: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    check_launchable(hidden)
    (rows, width), vocabulary = hidden.shape, head.shape[0]
    config = _launch_config(rows, vocabulary, k, head.element_size())
    num_tiles = triton.cdiv(vocabulary, config.BLOCK_U)
    sums = hidden.new_empty((rows, num_tiles, 2), dtype=torch.float32)
    best = hidden.new_empty((rows, num_tiles, k), dtype=torch.float32)
    best_id = hidden.new_empty((rows, num_tiles, k), dtype=torch.int32)
    ids, logprobs, logsumexp = _empty_outputs(hidden, k)
    if rows == 0:
        return ids, logprobs, logsumexp
    _draft_vocab_kernel[(num_tiles, triton.cdiv(rows, config.BLOCK_T))](
        hidden,
        head,
        sums,
        best,
        best_id,
        hidden.stride(0),
        head.stride(0),
        rows,
        width,
        vocabulary,
        A=k,
        BLOCK_U=config.BLOCK_U,
        BLOCK_T=config.BLOCK_T,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _draft_vocab_merge_kernel[(rows,)](
        sums,
        best,
        best_id,
        best_id if d2t is None else d2t,
        ids,
        logprobs,
        logsumexp,
        num_tiles,
        vocabulary,
        A=k,
        HAS_MAP=d2t is not None,
        BLOCK_N=config.BLOCK_N,
    )
    return ids, logprobs, logsumexp


@_draft_vocab_op.register_fake
def _(hidden: Tensor, head: Tensor, d2t: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(hidden, k)


def _empty_outputs(hidden_TD: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden_TD.shape[0]
    return (
        hidden_TD.new_empty((rows, k), dtype=torch.int64),
        hidden_TD.new_empty((rows, k), dtype=torch.float32),
        hidden_TD.new_empty(rows, dtype=torch.float32),
    )


def draft_vocab(hidden_TD: Tensor, head_UD: Tensor, d2t_U: Tensor | None, k: int) -> DraftTokens:
    """The `k` likeliest draft tokens of every row, as target ids, with their log-probabilities.

    Raises ValueError on a shape, dtype or layout the kernels would read wrongly.
    """
    for name, x in (("hidden_TD", hidden_TD), ("head_UD", head_UD)):
        if x.ndim != 2 or x.stride(-1) != 1 or x.dtype != hidden_TD.dtype:
            raise ValueError(
                f"{name}: must be 2-D {hidden_TD.dtype} with a contiguous last dimension, "
                f"got shape {tuple(x.shape)} strides {x.stride()} {x.dtype}"
            )
    if head_UD.shape[1] != hidden_TD.shape[1]:
        raise ValueError(f"head_UD: width must be {hidden_TD.shape[1]}, got {head_UD.shape[1]}")
    if not 1 <= k <= min(MAX_K, head_UD.shape[0]):
        raise ValueError(f"k: must be 1 to {MAX_K} and at most {head_UD.shape[0]}, got {k}")
    if d2t_U is not None and (d2t_U.shape != head_UD.shape[:1] or d2t_U.dtype != torch.int64):
        raise ValueError(
            f"d2t_U: must be int64 [{head_UD.shape[0]}], got {tuple(d2t_U.shape)} {d2t_U.dtype}"
        )
    return DraftTokens(*_draft_vocab_op(hidden_TD, head_UD, d2t_U, k))
