"""Target probabilities of chosen ids, after temperature and filtering, read from the logits.

    v = ids[t, a]
    p[t, a] = exp((logits[t, v] - max_t) * scale_t - log_mass_t) if row t keeps v, else 0

`row_filter` says what a row keeps. The ids are those that a draft proposed (`target_probs`), or all
of the draft vocabulary, u + d2t[u] (`draft_vocab_probs`). No [T, V] probabilities ever exist.
An id outside [0, V), such as the -1 of a pad, has probability 0. A row that is not legal gives NaN.

Letters: T rows, V target vocabulary, A ids per row, U draft vocabulary.
"""

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable, widened
from aerie.kernels.row_filter import RowFilter
from aerie.kernels.stream_launch import DTYPES, check_vector


def target_probs_ref(logits_TV: Tensor, ids_TA: Tensor, row_filter: RowFilter) -> Tensor:
    """The formula above in PyTorch."""
    vocabulary = logits_TV.shape[1]
    x_TA = widened(logits_TV.gather(1, ids_TA.clamp(0, vocabulary - 1)))
    columns = [getattr(row_filter, field.name)[:, None] for field in fields(row_filter)]
    maximum_T1, scale_T1, threshold_T1, last_id_T1, log_mass_T1 = columns
    is_tie_TA = (x_TA == threshold_T1) & (ids_TA <= last_id_T1)
    is_kept_TA = ((x_TA > threshold_T1) | is_tie_TA) & (ids_TA >= 0) & (ids_TA < vocabulary)
    probs_TA = ((x_TA - maximum_T1) * scale_T1 - log_mass_T1).exp()
    probs_TA = torch.where(is_kept_TA, probs_TA, 0.0)
    return torch.where(maximum_T1.isnan(), torch.nan, probs_TA)


def draft_vocab_probs_ref(
    logits_TV: Tensor, d2t_U: Tensor | None, vocabulary: int, row_filter: RowFilter
) -> Tensor:
    """`target_probs_ref` of the target ids of the whole draft vocabulary."""
    ids_U = torch.arange(vocabulary, device=logits_TV.device)
    ids_U = ids_U if d2t_U is None else ids_U + d2t_U
    return target_probs_ref(logits_TV, ids_U.expand(len(logits_TV), vocabulary), row_filter)


@triton.jit
def _target_probs_kernel(
    logits_ptr,  # [T, V]
    ids_ptr,  # [T, A], or d2t [A] if IS_MAP
    maximum_ptr,  # [T], as the four below
    scale_ptr,
    threshold_ptr,
    last_id_ptr,
    log_mass_ptr,
    probs_ptr,  # [T, A]
    stride_lt,
    stride_it,
    V,
    A,
    IS_MAP: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    in_row = a < A
    ids = a.to(tl.int64)
    if HAS_IDS:
        loaded = tl.load(ids_ptr + t * stride_it + a, mask=in_row, other=-1)
        ids = ids + loaded if IS_MAP else loaded
    is_id = in_row & (ids >= 0) & (ids < V)
    logit_ptr = logits_ptr + t * stride_lt + ids
    logit = tl.load(logit_ptr, mask=is_id, other=-float("inf")).to(tl.float32)
    maximum, threshold = tl.load(maximum_ptr + t), tl.load(threshold_ptr + t)
    is_tie = (logit == threshold) & (ids <= tl.load(last_id_ptr + t))
    is_kept = is_id & ((logit > threshold) | is_tie)
    exponent = (logit - maximum) * tl.load(scale_ptr + t) - tl.load(log_mass_ptr + t)
    probs = tl.where(is_kept, tl.exp(exponent), 0.0)
    probs = tl.where(maximum == maximum, probs, float("nan"))
    tl.store(probs_ptr + t * A + a, probs, mask=in_row)


@dataclass(frozen=True)
class LaunchConfig:
    """One program gathers `BLOCK_A` ids of one row."""

    BLOCK_A: int
    num_warps: int


def _launch_config(width: int) -> LaunchConfig:
    """Four ids per thread, up to eight warps. Chosen by shape; not yet measured on a GPU."""
    block = min(1024, triton.next_power_of_2(max(1, width)))
    return LaunchConfig(block, num_warps=max(1, block // 128))


@torch.library.custom_op("aerie::target_probs", mutates_args=())
def _target_probs_op(
    logits: Tensor, ids: Tensor | None, filter: list[Tensor], width: int, is_map: bool
) -> Tensor:
    check_launchable(logits)
    rows, vocabulary = logits.shape
    probs_TA = logits.new_empty((rows, width), dtype=torch.float32)
    config = _launch_config(width)
    maximum, scale, threshold, last_id, log_mass = filter
    if probs_TA.numel() > 0:
        _target_probs_kernel[(rows, triton.cdiv(width, config.BLOCK_A))](
            logits,
            logits if ids is None else ids,
            maximum,
            scale,
            threshold,
            last_id,
            log_mass,
            probs_TA,
            logits.stride(0),
            0 if is_map or ids is None else ids.stride(0),
            vocabulary,
            width,
            IS_MAP=is_map,
            HAS_IDS=ids is not None,
            BLOCK_A=config.BLOCK_A,
            num_warps=config.num_warps,
        )
    return probs_TA


@_target_probs_op.register_fake
def _(logits: Tensor, ids: Tensor | None, filter: list[Tensor], width: int, is_map: bool) -> Tensor:
    return logits.new_empty((logits.shape[0], width), dtype=torch.float32)


def target_probs(logits_TV: Tensor, ids_TA: Tensor, row_filter: RowFilter) -> Tensor:
    """Probabilities [T, A] (float32) of target ids `ids_TA` (int64) under the filtered target.

    Raises ValueError on a shape, dtype, device or layout the kernel would read wrongly.
    """
    filter = _checked(logits_TV, row_filter)
    rows, x = logits_TV.shape[0], ids_TA
    is_matrix = x.ndim == 2 and x.shape[0] == rows and (x.stride(1) == 1 or x.shape[1] <= 1)
    if not is_matrix or x.dtype != torch.int64 or x.device != logits_TV.device:
        raise ValueError(
            f"ids_TA: must be int64 [{rows}, A] on {logits_TV.device} with a contiguous last "
            f"dimension, got {x.dtype} {tuple(x.shape)} {x.stride()} on {x.device}"
        )
    return _target_probs_op(logits_TV, ids_TA, filter, x.shape[1], False)


def draft_vocab_probs(
    logits_TV: Tensor, d2t_U: Tensor | None, vocabulary: int, row_filter: RowFilter
) -> Tensor:
    """Probabilities [T, U] of all `vocabulary` draft ids, which stand for target ids u + d2t[u]."""
    filter = _checked(logits_TV, row_filter)
    if vocabulary < 1:
        raise ValueError(f"vocabulary: must be at least 1, got {vocabulary}")
    check_vector("d2t_U", d2t_U, vocabulary, logits_TV, (torch.int64,))
    return _target_probs_op(logits_TV, d2t_U, filter, vocabulary, d2t_U is not None)


def _checked(logits_TV: Tensor, row_filter: RowFilter) -> list[Tensor]:
    x = logits_TV
    if x.ndim != 2 or x.stride(-1) != 1 or x.dtype not in DTYPES:
        raise ValueError(
            f"logits_TV: must be float32, float16 or bfloat16 [T, V] with a contiguous last "
            f"dimension, got {x.dtype} {tuple(x.shape)} {x.stride()}"
        )
    for field in fields(row_filter):
        dtype = torch.int32 if field.name == "last_id_T" else torch.float32
        column = getattr(row_filter, field.name)
        check_vector(f"row_filter.{field.name}", column, x.shape[0], x, (dtype,))
    return [getattr(row_filter, field.name) for field in fields(row_filter)]
