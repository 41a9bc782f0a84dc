"""Draft head: the k likeliest tokens of every row over the reduced vocabulary, in one pass.

    logits = draft_logits(hidden, head)              [T, U], with its norm, scales and roundings
    logsumexp = log sum_u exp(logits_u)              logprob_u = logits_u - logsumexp
    ids, logprobs = the k largest, falling;          target id = u + d2t[u]

Ties go to the lowest draft id. `d2t` holds OFFSETS (EAGLE-3 checkpoints), not ids; without it the
draft vocabulary is the target's. The kernel streams over tiles of the vocabulary and keeps of each
only its sum of exponentials and its own k best; a second, small kernel (`draft_vocab_merge`) merges
the tiles. Neither [T, U] logits nor a [T, V] row of target logits exists at any time. A row with a
NaN yields NaN log-probabilities beside ids that are merely legal.

Letters: T rows, D hidden, U draft vocabulary, A the k kept.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable, widened
from aerie.kernels.draft_logits import (
    FinalNorm,
    check_head,
    draft_logits_ref,
    head_config,
    logits_tile,
)
from aerie.kernels.draft_vocab_merge import NO_KEY, key_logit, merge_tiles, sort_key
from aerie.kernels.stream_launch import (
    LaunchConfig,
    check_vector,
    scale_mode,
    scale_stride,
    streamed,
)
from aerie.kernels.target import Target, target_of

MAX_K = 16


@dataclass(frozen=True)
class DraftTokens:
    """The k likeliest draft tokens of every row, likeliest first."""

    ids_TA: Tensor  # int64, ids of the TARGET vocabulary
    logprobs_TA: Tensor  # float32, over the draft vocabulary
    logsumexp_T: Tensor  # float32, of the draft logits


def draft_vocab_ref(
    hidden_TD: Tensor,
    head_UD: Tensor,
    d2t_U: Tensor | None,
    k: int,
    *,
    norm: FinalNorm | None = None,
    logit_scale: float = 1.0,
    scale_U: Tensor | None = None,
) -> DraftTokens:
    """The formulas above in PyTorch, with all logits at once."""
    logits_TU = widened(
        draft_logits_ref(hidden_TD, head_UD, norm=norm, logit_scale=logit_scale, scale_U=scale_U)
    )
    if k == 1:
        kept_TA, ids_TA = logits_TU.max(dim=-1, keepdim=True)
    else:
        sorted_TU, order_TU = logits_TU.sort(dim=-1, descending=True, stable=True)
        kept_TA, ids_TA = sorted_TU[:, :k], order_TU[:, :k]
    logprobs_TA = logits_TU.log_softmax(dim=-1).gather(1, ids_TA)  # logsumexp is many calls
    logsumexp_T = (kept_TA - logprobs_TA)[:, 0]
    if d2t_U is not None:
        ids_TA = ids_TA + d2t_U.take(ids_TA)
    return DraftTokens(ids_TA, logprobs_TA, logsumexp_T)


@triton.jit(do_not_specialize=["T"])
def _draft_vocab_kernel(
    hidden_ptr,  # [T, D]
    head_ptr,  # [U, D]
    gain_ptr,  # [D], read if HAS_NORM
    scale_ptr,  # [U], [1] or [U / 128, D / 128], read if SCALE
    keys_ptr,  # [T, A, tiles], the best of every tile
    sums_ptr,  # [T, tiles], of exp(logit - maximum of the tile)
    stride_ht,
    stride_wu,
    stride_su,
    T,
    D,
    U,
    eps,
    logit_scale,
    A: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    tile, num_tiles = tl.program_id(1), tl.num_programs(1)
    u = tile * BLOCK_U + tl.arange(0, BLOCK_U)[:, None]
    logits = logits_tile(
        hidden_ptr, head_ptr, gain_ptr, scale_ptr, stride_ht, stride_wu, stride_su,
        t, u, T, D, U, eps, logit_scale, HAS_NORM, SCALE, BLOCK_U, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    keys = tl.where(u < U, sort_key(logits, u), NO_KEY)
    best = tl.max(keys, axis=0, keep_dims=True)
    maximum = key_logit(best)
    # a tile of nothing but -inf: -inf - -inf would be NaN
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.sum(tl.where(u < U, tl.exp(logits - shift), 0.0), axis=0, keep_dims=True)
    tl.store(sums_ptr + t * num_tiles + tile, total, mask=t < T)
    best_ptr = keys_ptr + t * A * num_tiles + tile
    tl.store(best_ptr, best, mask=t < T)
    for _ in range(1, A):
        keys = tl.where(keys == best, NO_KEY, keys)
        best = tl.max(keys, axis=0, keep_dims=True)
        best_ptr += num_tiles
        tl.store(best_ptr, best, mask=t < T)


def _launch_config(
    target: Target, rows: int, vocabulary: int, itemsize: int, head_itemsize: int
) -> LaunchConfig:
    """The tile of `draft_logits` for up to 64 rows at a time: more keys do not fit the registers.

    Not yet measured on a GPU.
    """
    return head_config(target, min(rows, 64), vocabulary, itemsize, head_itemsize)


@torch.library.custom_op("aerie::draft_vocab", mutates_args=())
def _draft_vocab_op(
    hidden: Tensor,
    head: Tensor,
    d2t: Tensor | None,
    k: int,
    gain: Tensor | None,
    eps: float,
    logit_scale: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_launchable(hidden)
    (rows, width), vocabulary = hidden.shape, head.shape[0]
    head, head_itemsize = streamed(head, width), head.itemsize
    config = _launch_config(target_of(hidden), rows, vocabulary, hidden.itemsize, head_itemsize)
    num_tiles = triton.cdiv(vocabulary, config.BLOCK_F)
    keys = hidden.new_empty((rows, k, num_tiles), dtype=torch.int64)
    sums = hidden.new_empty((rows, num_tiles), dtype=torch.float32)
    outputs = _empty_outputs(hidden, k)
    if rows == 0:
        return outputs
    _draft_vocab_kernel[(triton.cdiv(rows, config.BLOCK_T), num_tiles)](
        hidden,
        head,
        hidden if gain is None else gain,
        hidden if scale is None else scale,
        keys,
        sums,
        hidden.stride(0),
        head.stride(0),
        scale_stride(scale),
        rows,
        width,
        vocabulary,
        eps,
        logit_scale,
        A=k,
        HAS_NORM=gain is not None,
        SCALE=scale_mode(scale),
        BLOCK_U=config.BLOCK_F,
        BLOCK_T=config.BLOCK_T,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return merge_tiles(keys, sums, d2t, config.BLOCK_F, outputs)


@_draft_vocab_op.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    d2t: Tensor | None,
    k: int,
    gain: Tensor | None,
    eps: float,
    logit_scale: float,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(hidden, k)


def _empty_outputs(hidden_TD: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden_TD.shape[0]
    return (
        hidden_TD.new_empty((rows, k), dtype=torch.int64),
        hidden_TD.new_empty((rows, k), dtype=torch.float32),
        hidden_TD.new_empty(rows, dtype=torch.float32),
    )


def draft_vocab(
    hidden_TD: Tensor,
    head_UD: Tensor,
    d2t_U: Tensor | None,
    k: int,
    *,
    norm: FinalNorm | None = None,
    logit_scale: float = 1.0,
    scale_U: Tensor | None = None,
) -> DraftTokens:
    """The `k` likeliest draft tokens of every row, as target ids, with their log-probabilities.

    `scale_U` (float32, [U], [1] or [ceil(U / 128), ceil(D / 128)]) comes with an FP8 head and only
    then. Raises ValueError on a
    shape, dtype, device or layout the kernels would read wrongly.
    """
    check_head(hidden_TD, head_UD, norm, scale_U)
    vocabulary = head_UD.shape[0]
    if not 1 <= k <= min(MAX_K, vocabulary):
        raise ValueError(f"k: must be 1 to {MAX_K} and at most {vocabulary}, got {k}")
    check_vector("d2t_U", d2t_U, vocabulary, hidden_TD, (torch.int64,))
    gain, eps = (None, 0.0) if norm is None else (norm.weight_D, norm.eps)
    return DraftTokens(
        *_draft_vocab_op(hidden_TD, head_UD, d2t_U, k, gain, eps, logit_scale, scale_U)
    )
