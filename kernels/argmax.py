"""Greedy choice: the id of the largest logit in every row.

    id = min { v : logits[v] = max(logits) },   -1 if the row holds NaN or +inf, or only -inf

Ties go to the lowest id, so the choice does not depend on how the row is cut into tiles. A row that
is no distribution turns into -1 rather than into some token: the caller reads the ids anyway and
can raise at no extra sync. Single ids may be masked by -inf. Where a row lies in columns on several
GPUs, `argmax_keys` gives the best of each as a key; the largest of them says the row's id.

Letters: T rows, V target vocabulary.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable, constant
from aerie.kernels.choice_key import choice_key, key_id, key_value
from aerie.kernels.draft_vocab_merge import sort_key


def argmax_ref(logits_TV: Tensor) -> Tensor:
    """The rule above in PyTorch, whose `max` promises the first of equal maxima and keeps NaN."""
    maximum_T, ids_T = logits_TV.max(dim=-1)
    is_finite_T = maximum_T.abs() < constant(torch.inf, maximum_T)
    return torch.where(is_finite_T, ids_T, constant(-1, ids_T))


def argmax_keys_ref(logits_TV: Tensor, first: int) -> Tensor:
    """The best key of columns `first` .. in PyTorch."""
    maximum_T, column_T = logits_TV.max(dim=-1)
    return choice_key(maximum_T.float(), column_T + first)


def chosen_ids(keys_T: Tensor) -> Tensor:
    """The ids of the largest keys of whole rows; -1 as in `argmax`."""
    return torch.where(key_value(keys_T).abs() < torch.inf, key_id(keys_T), -1)


@triton.jit
def _argmax_kernel(
    logits_ptr,  # [T, V], columns first .. of a row
    chosen_ptr,  # [T], ids or keys
    stride_lt,
    first,
    V,
    AS_KEYS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK_V)
    best = tl.full([BLOCK_V], -float("inf"), tl.float32)
    best_id = v  # per lane
    num_nan = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        in_row = start + v < V
        logits = tl.load(logits_ptr + t * stride_lt + start + v, mask=in_row, other=-float("inf"))
        logits = logits.to(tl.float32)
        num_nan += (logits != logits).to(tl.int32)
        higher = logits > best
        best = tl.where(higher, logits, best)
        best_id = tl.where(higher, start + v, best_id)
    maximum = tl.max(best, axis=0)
    lowest = tl.min(tl.where(best == maximum, best_id, V), axis=0)
    has_nan = tl.sum(num_nan, axis=0) > 0
    if AS_KEYS:
        maximum = tl.where(has_nan, float("nan"), maximum)
        tl.store(chosen_ptr + t, sort_key(maximum, first + lowest))
    else:
        is_legal = (has_nan == 0) & (tl.abs(maximum) < float("inf"))
        tl.store(chosen_ptr + t, tl.where(is_legal, lowest, -1).to(tl.int64))


@dataclass(frozen=True)
class LaunchConfig:
    """One row per program, `BLOCK_V` lanes that walk along it."""

    BLOCK_V: int
    num_warps: int


def _launch_config(vocabulary: int) -> LaunchConfig:
    """Up to 4096 lanes, eight per thread. Chosen by shape; not yet measured on a GPU."""
    block = min(4096, triton.next_power_of_2(vocabulary))
    return LaunchConfig(BLOCK_V=block, num_warps=min(16, max(1, block // 256)))


@torch.library.custom_op("aerie::argmax", mutates_args=())
def _argmax_op(logits: Tensor, first: int = 0, as_keys: bool = False) -> Tensor:
    check_launchable(logits)
    rows, vocabulary = logits.shape
    ids = logits.new_empty(rows, dtype=torch.int64)
    config = _launch_config(vocabulary)
    if rows > 0:
        _argmax_kernel[(rows,)](
            logits,
            ids,
            logits.stride(0),
            first,
            vocabulary,
            AS_KEYS=as_keys,
            BLOCK_V=config.BLOCK_V,
            num_warps=config.num_warps,
        )
    return ids


@_argmax_op.register_fake
def _(logits: Tensor, first: int = 0, as_keys: bool = False) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def argmax(logits_TV: Tensor) -> Tensor:
    """Lowest id of the largest logit of every row, [T] int64; -1 for a row that is no distribution.

    Raises ValueError on a shape or layout the kernel would read wrongly.
    """
    _check(logits_TV)
    return _argmax_op(logits_TV)


def argmax_keys(logits_TV: Tensor, first: int) -> Tensor:
    """The key (`choice_key`) of the largest logit of columns `first` .. of every row, [T] int64;
    one of NaN where there is a NaN. Raises ValueError as `argmax`.
    """
    if first < 0:
        raise ValueError(f"first: must be the id of the first column, got {first}")
    _check(logits_TV)
    return _argmax_op(logits_TV, first, True)


def _check(logits_TV: Tensor) -> None:
    if logits_TV.ndim != 2 or logits_TV.shape[1] == 0 or logits_TV.stride(-1) != 1:
        raise ValueError(
            f"logits_TV: must be [T, V] with V > 0 and a contiguous last dimension, "
            f"got shape {tuple(logits_TV.shape)} strides {logits_TV.stride()}"
        )
    check_dtype("logits_TV", logits_TV)
