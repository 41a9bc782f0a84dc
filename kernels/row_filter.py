"""Temperature, top-k, top-p and min-p of every row, as the few numbers that a gather needs.

With q_v = exp((logits_v - max) / temperature) and the order (larger logit first, then lower id):

    top-k   keeps the first k;
    top-p   keeps of these the shortest beginning whose mass is >= p times theirs, at least one;
    min-p   keeps of these the v with q_v >= min_p.

What is kept is always a beginning of the order. It is described by its last member, so that
probability(v) = q_v / (mass kept) if (logits_v, v) does not come after the last, else 0
(`target_probs`), and no [T, V] softmax is ever written. Temperature 0 is greedy: top-k 1. Filters
are off at k <= 0, p >= 1, min_p <= 0. A row with a NaN or +inf, or of nothing but -inf, gets a NaN
maximum, and so do its probabilities.

The last member is found by an exact search (`row_search`) whose sums are integers, so a boundary
does not depend on how a row is cut. Many programs walk a row, once per digit of a logit: with top-k
and top-p that are 9 launches in bfloat16, 11 in float16 and 15 in float32, without either three.

Letters: T rows, V target vocabulary.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aerie.kernels.backend import check_launchable, widened
from aerie.kernels.row_filter_kernel import (
    _row_filter_kernel,
    _row_filter_merge_kernel,
    _row_limit_kernel,
)
from aerie.kernels.row_search import _row_digits_kernel, _row_maxima_kernel
from aerie.kernels.stream_launch import DTYPES, SMS, check_vector

MAX_VOCABULARY = 2**19  # times 2^44 stays below 2^63
MAX_SHARES = 64


@dataclass(frozen=True)
class RowFilter:
    """What every row keeps; a row that is not legal has a NaN maximum."""

    maximum_T: Tensor  # float32
    scale_T: Tensor  # float32, 1 / temperature; 1 if greedy
    threshold_T: Tensor  # float32, the smallest logit kept
    last_id_T: Tensor  # int32, the highest id kept among logits equal to the threshold
    log_mass_T: Tensor  # float32, log of the sum of q over what is kept


def row_filter_ref(
    logits_TV: Tensor,
    temperature_T: Tensor,
    top_k_T: Tensor | None = None,
    top_p_T: Tensor | None = None,
    min_p_T: Tensor | None = None,
) -> RowFilter:
    """The rule above in PyTorch, with a sort."""
    x_TV, order_TV = widened(logits_TV).sort(dim=-1, descending=True, stable=True)
    vocabulary, is_greedy_T = x_TV.shape[1], temperature_T == 0
    scale_T = torch.where(is_greedy_T, 1.0, 1 / temperature_T).to(x_TV.dtype)
    q_TV = ((x_TV - x_TV[:, :1]) * scale_T[:, None]).exp()
    mass_TV = q_TV.cumsum(dim=-1)
    last_T = torch.full_like(order_TV[:, 0], vocabulary - 1)  # position in the order
    if top_k_T is not None:
        last_T = torch.where((top_k_T > 0) & (top_k_T < vocabulary), top_k_T - 1, last_T)
    last_T = torch.where(is_greedy_T, 0, last_T)
    if top_p_T is not None:
        share_T = mass_TV.gather(1, last_T[:, None])[:, 0] * top_p_T
        shortest_T = (mass_TV < share_T[:, None]).sum(dim=-1)
        last_T = torch.where(top_p_T < 1, torch.minimum(shortest_T, last_T), last_T)
    if min_p_T is not None:
        likely_T = (q_TV >= min_p_T.clamp(max=1)[:, None]).sum(dim=-1)
        last_T = torch.minimum(last_T, (likely_T - 1).clamp(min=0))
    last_T1, maximum_T = last_T[:, None], x_TV[:, 0]
    return RowFilter(
        torch.where(maximum_T.isfinite(), maximum_T, torch.nan),
        scale_T,
        x_TV.gather(1, last_T1)[:, 0],
        order_TV.gather(1, last_T1)[:, 0].int(),
        mass_TV.gather(1, last_T1)[:, 0].log(),
    )


@dataclass(frozen=True)
class LaunchConfig:
    """`SHARES` programs walk a row, `size` logits each; a logit has `LEVELS` digits of `DIGIT` bits
    above `SHIFT` unused ones. A search looks at `SEARCH_V` logits at a time, the rest at `BLOCK_V`.
    """

    SHARES: int
    size: int
    SHIFT: int
    DIGIT: int
    LEVELS: int
    SEARCH_V: int
    BLOCK_V: int


def _launch_config(rows: int, vocabulary: int, dtype: torch.dtype) -> LaunchConfig:
    """Programs for every SM twice, with 1024 logits each at least. A bfloat16 uses 16 bits of a
    float32 and so three digits of 6, a float16 19 and four of 5, a float32 six of 6: a walk
    compares every logit with 2^DIGIT digits. Not yet measured on a GPU.
    """
    shift = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[dtype]
    digit = 5 if dtype == torch.float16 else 6
    shares = min(triton.cdiv(2 * SMS, max(1, rows)), triton.cdiv(vocabulary, 1024), MAX_SHARES)
    size = triton.cdiv(triton.cdiv(vocabulary, shares), 1024) * 1024
    shares = triton.cdiv(vocabulary, size)
    return LaunchConfig(shares, size, shift, digit, triton.cdiv(32 - shift, digit), 128, 1024)


@torch.library.custom_op("aerie::row_filter", mutates_args=())
def _row_filter_op(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_launchable(logits)
    outputs = _empty_outputs(logits)
    if len(logits) > 0:
        _launch(logits, temperature, top_k, top_p, min_p, outputs)
    return outputs


def _launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    outputs: tuple[Tensor, ...],
) -> None:
    rows, vocabulary = logits.shape
    config = _launch_config(rows, vocabulary, logits.dtype)
    shares = logits.new_empty(3, rows, config.SHARES, dtype=torch.float32)
    maxima, firsts, lowest = shares[0], shares[1].view(torch.int32), shares[2]
    grid, stride = (rows, config.SHARES), logits.stride(0)
    _row_maxima_kernel[grid](
        logits, maxima, firsts, stride, vocabulary, config.size, BLOCK_V=config.BLOCK_V
    )
    limit = logits.new_empty(rows, dtype=torch.int64)
    asked = temperature if top_k is None else top_k
    has_k, has_p, bins = top_k is not None, top_p is not None, 1 << config.DIGIT

    def walk(level: int, before: Walk, has_limit: bool) -> Walk:
        walked = _empty_walk(logits, config)
        _row_digits_kernel[grid](
            logits, maxima, temperature, asked, limit, *before, *walked, stride, vocabulary,
            config.size, config.DIGIT * (config.LEVELS - 1 - level), IS_FIRST=level == 0,
            DIGIT=config.DIGIT, HAS_K=has_k, HAS_LIMIT=has_limit, SHIFT=config.SHIFT,
            BLOCK_V=config.SEARCH_V, BLOCK_S=MAX_SHARES, num_warps=8,
        )  # fmt: skip
        return walked

    found = first = (limit, limit, limit)  # not read without a walk
    if has_k or has_p:
        found = first = walk(0, found, False)
    if has_k:
        for level in range(1, config.LEVELS):
            found = walk(level, found, False)
    if has_p:
        _row_limit_kernel[(rows,)](
            maxima, temperature, asked, top_p, *found, limit, vocabulary, config.SHARES,
            HAS_K=has_k, SHIFT=config.SHIFT, BINS=bins, BLOCK_S=MAX_SHARES,
        )  # fmt: skip
        found = first  # top-k and top-p share the first walk
        for level in range(1, config.LEVELS):
            found = walk(level, found, True)
    last_ids, kept = torch.empty_like(firsts), logits.new_empty(firsts.shape, dtype=torch.int64)
    _row_filter_kernel[grid](
        logits, maxima, firsts, temperature, asked, limit, temperature if min_p is None else min_p,
        *found, lowest, last_ids, kept, stride, vocabulary, config.size, HAS_K=has_k, HAS_P=has_p,
        HAS_MIN=min_p is not None, SHIFT=config.SHIFT, BINS=bins, BLOCK_V=config.BLOCK_V,
        BLOCK_S=MAX_SHARES,
    )  # fmt: skip
    _row_filter_merge_kernel[(rows,)](
        maxima, lowest, last_ids, kept, temperature, *outputs, vocabulary, config.SHARES,
        BLOCK_S=MAX_SHARES,
    )  # fmt: skip


Walk = tuple[Tensor, Tensor, Tensor]  # as `descended` reads them: found, counts and masses


def _empty_walk(logits: Tensor, config: LaunchConfig) -> Walk:
    rows, cells = len(logits), (len(logits), config.SHARES, 1 << config.DIGIT)
    return (
        logits.new_empty((rows, 3), dtype=torch.int64),
        logits.new_empty(cells, dtype=torch.int32),
        logits.new_empty(cells, dtype=torch.int64),
    )


@_row_filter_op.register_fake
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(logits)


def _empty_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, f32 = logits.shape[0], torch.float32
    maximum, scale, threshold, log_mass = [logits.new_empty(rows, dtype=f32) for _ in range(4)]
    return maximum, scale, threshold, logits.new_empty(rows, dtype=torch.int32), log_mass


def row_filter(
    logits_TV: Tensor,
    temperature_T: Tensor,
    top_k_T: Tensor | None = None,
    top_p_T: Tensor | None = None,
    min_p_T: Tensor | None = None,
) -> RowFilter:
    """What every row keeps. `temperature_T`, `top_p_T` and `min_p_T` are float32, `top_k_T` int64.

    Raises ValueError on a shape, dtype, device or layout the kernel would read wrongly.
    """
    x = logits_TV
    is_matrix = x.ndim == 2 and x.stride(-1) == 1 and x.dtype in DTYPES
    if not is_matrix or not 0 < x.shape[1] <= MAX_VOCABULARY:
        raise ValueError(
            f"logits_TV: must be float32, float16 or bfloat16 [T, V], 0 < V <= {MAX_VOCABULARY}, "
            f"with a contiguous last dimension, got {x.dtype} {tuple(x.shape)} {x.stride()}"
        )
    f32 = (torch.float32,)
    check_vector("temperature_T", temperature_T, x.shape[0], x, f32)
    check_vector("top_k_T", top_k_T, x.shape[0], x, (torch.int64,))
    check_vector("top_p_T", top_p_T, x.shape[0], x, f32)
    check_vector("min_p_T", min_p_T, x.shape[0], x, f32)
    return RowFilter(*_row_filter_op(x, temperature_T, top_k_T, top_p_T, min_p_T))
