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
does not depend on how a row is cut. One program walks a row, once per bit of a logit at worst; a
row without top-k and top-p takes three walks.

Letters: T rows, V target vocabulary.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable, widened
from aerie.kernels.row_search import UNIT, above, fixed_mass, load_ordered, lowest_order
from aerie.kernels.stream_launch import DTYPES, check_vector

MAX_VOCABULARY = 2**19  # times 2^44 stays below 2^63
ENDLESS = tl.constexpr(2**63 - 1)


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


@triton.jit
def _row_filter_kernel(
    logits_ptr,  # [T, V]
    temperature_ptr,  # [T]
    top_k_ptr,  # [T], read if HAS_K
    top_p_ptr,  # [T], read if HAS_P
    min_p_ptr,  # [T], read if HAS_MIN
    maximum_ptr,  # [T], as the four below
    scale_ptr,
    threshold_ptr,
    last_id_ptr,
    log_mass_ptr,
    stride_lt,
    V,
    HAS_K: tl.constexpr,
    HAS_P: tl.constexpr,
    HAS_MIN: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + t * stride_lt
    lane_maximum = tl.full([BLOCK_V], -float("inf"), tl.float32)
    num_nan = tl.zeros([BLOCK_V], tl.int32)
    for start in range(0, V, BLOCK_V):
        logit, _ = load_ordered(row_ptr, start + tl.arange(0, BLOCK_V), V, SHIFT)
        num_nan += (logit != logit).to(tl.int32)
        lane_maximum = tl.where(logit > lane_maximum, logit, lane_maximum)
    maximum = tl.max(lane_maximum, axis=0)
    is_legal = (tl.sum(num_nan, axis=0) == 0) & (tl.abs(maximum) < float("inf"))
    temperature = tl.load(temperature_ptr + t).to(tl.float32)
    is_greedy = (temperature == 0.0) | (is_legal == 0)  # an illegal row needs no search
    scale = 1.0 / tl.where(is_greedy, 1.0, temperature)

    k = V
    if HAS_K:
        asked = tl.load(top_k_ptr + t)
        k = tl.where((asked > 0) & (asked < V), asked, V).to(tl.int32)
    k = tl.where(is_greedy, 1, k)
    bits = tl.where(maximum == 0.0, 0.0, maximum).to(tl.int32, bitcast=True)
    high = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)
    low = tl.full([], -(2**31), tl.int64) >> SHIFT  # below every logit, -inf included
    order, share = tl.where(k == 1, high, low), tl.full([], ENDLESS, tl.int64)
    if (k > 1) & (k < V):
        order = lowest_order(row_ptr, V, low, high, k, share, maximum, scale, SHIFT, BLOCK_V)
    count, mass, one = above(row_ptr, V, order.to(tl.int32), maximum, scale, SHIFT, BLOCK_V)
    if HAS_P:
        top_p = tl.load(top_p_ptr + t).to(tl.float64)
        if (top_p < 1.0) & (k > 1):
            total = mass + (k - count).to(tl.int64) * one
            share = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
            order = lowest_order(row_ptr, V, order, high, k, share, maximum, scale, SHIFT, BLOCK_V)
            count, mass, one = above(
                row_ptr, V, order.to(tl.int32), maximum, scale, SHIFT, BLOCK_V
            )  # fmt: skip
    one = tl.maximum(one, 1)
    num_ties = tl.minimum((k - count).to(tl.int64), (share - mass - 1) // one + 1)

    least = tl.load(min_p_ptr + t).to(tl.float32) if HAS_MIN else 0.0
    seen = tl.zeros([], tl.int32)
    last_id = tl.full([BLOCK_V], -1, tl.int32)
    lowest = tl.full([BLOCK_V], float("inf"), tl.float32)
    kept = tl.zeros([BLOCK_V], tl.int64)
    for start in range(0, V, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logit, own = load_ordered(row_ptr, v, V, SHIFT)
        is_tie = (own == order) & (v < V)
        rank = tl.cumsum(is_tie.to(tl.int32), axis=0) + seen
        seen += tl.sum(is_tie.to(tl.int32), axis=0)
        is_kept = ((own > order) | (is_tie & (rank <= num_ties))) & (v < V)
        is_kept &= tl.exp((logit - maximum) * scale) >= tl.minimum(least, 1.0)
        last_id = tl.maximum(last_id, tl.where(is_kept & is_tie, v, -1))
        lowest = tl.minimum(lowest, tl.where(is_kept, logit, float("inf")))
        kept += tl.where(is_kept, fixed_mass(logit, maximum, scale), 0)
    last_id, total = tl.max(last_id, axis=0), tl.sum(kept, axis=0)
    tl.store(maximum_ptr + t, tl.where(is_legal, maximum, float("nan")))
    tl.store(scale_ptr + t, scale)
    tl.store(threshold_ptr + t, tl.min(lowest, axis=0))
    tl.store(last_id_ptr + t, tl.where(last_id == -1, V, last_id))  # -1: min-p cut above the ties
    tl.store(log_mass_ptr + t, tl.log(total.to(tl.float32) / UNIT))


@dataclass(frozen=True)
class LaunchConfig:
    """One row per program, `BLOCK_V` lanes that walk along it; unused low bits of a logit."""

    BLOCK_V: int
    SHIFT: int
    num_warps: int


def _launch_config(vocabulary: int, dtype: torch.dtype) -> LaunchConfig:
    """Up to 4096 lanes, eight per thread. A bfloat16 uses 16 bits of a float32, a float16 19.

    Not yet measured on a GPU.
    """
    block = min(4096, triton.next_power_of_2(vocabulary))
    shift = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[dtype]
    return LaunchConfig(block, shift, num_warps=min(16, max(1, block // 256)))


@torch.library.custom_op("aerie::row_filter", mutates_args=())
def _row_filter_op(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_launchable(logits)
    rows, vocabulary = logits.shape
    outputs = _empty_outputs(logits)
    config = _launch_config(vocabulary, logits.dtype)
    if rows > 0:
        _row_filter_kernel[(rows,)](
            logits,
            temperature,
            temperature if top_k is None else top_k,
            temperature if top_p is None else top_p,
            temperature if min_p is None else min_p,
            *outputs,
            logits.stride(0),
            vocabulary,
            HAS_K=top_k is not None,
            HAS_P=top_p is not None,
            HAS_MIN=min_p is not None,
            SHIFT=config.SHIFT,
            BLOCK_V=config.BLOCK_V,
            num_warps=config.num_warps,
        )
    return outputs


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
