"""Llama 4's router: the top experts by raw logit, scored by a sigmoid.

    ids = top-k of logits,   scores = sigmoid(logits[ids])                      (no softmax)

Ties go to the lowest expert id, so that a step routes the same way in every batch. A NaN logit
counts as the largest, as in PyTorch's sort: its row gets a NaN score instead of a wrong expert. The
sigmoid is float32 and rounded once. Scores multiply the *input* of the expert (`experts.py`).

Letters: T rows, E experts, A experts per token.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable

MAX_EXPERTS = 256  # one program holds all logits of its rows in registers


@dataclass(frozen=True)
class Routing:
    """The experts of every row (int32, best first) and the scores that multiply their inputs."""

    ids_TA: Tensor
    scores_TA: Tensor


def router_ref(logits_TE: Tensor, experts_per_token: int) -> Routing:
    """The formula above in PyTorch: `argmax` takes the first maximum, the sort is stable, and
    `sigmoid` computes in float32."""
    if experts_per_token == 1:  # not `max`, which wakes the thread pool for two rows already
        ids_TA = logits_TE.argmax(dim=1, keepdim=True)
    else:
        order_TE = torch.sort(logits_TE, dim=1, descending=True, stable=True).indices
        ids_TA = order_TE[:, :experts_per_token]
    top_TA = logits_TE.gather(1, ids_TA)
    return Routing(ids_TA.int(), torch.sigmoid(top_TA))


@triton.jit
def logit_rank(x, e, BLOCK_E: tl.constexpr):
    """int64 keys, larger is better: NaN first, then float32 `x` by value, then the lowest id."""
    x = tl.where(x == 0.0, 0.0, x)  # -0.0 and 0.0 tie
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(x != x, 0x7FFFFFFF, ordered)
    return ordered.to(tl.int64) * BLOCK_E + (BLOCK_E - 1 - e)


@triton.jit(do_not_specialize=["T"])
def _router_kernel(
    logits_ptr,  # [T, E]
    ids_ptr,  # [T, A]
    scores_ptr,  # [T, A]
    stride_lt,
    T,
    E,
    A: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    in_rows = t < T
    in_tile = in_rows[:, None] & (e < E)[None, :]
    row_ptr = logits_ptr + t * stride_lt
    logits = tl.load(row_ptr[:, None] + e[None, :], mask=in_tile, other=0.0).to(tl.float32)
    lowest = -0x8000000000000000
    rank = tl.where(in_tile, logit_rank(logits, e[None, :], BLOCK_E), lowest)
    for a in range(A):
        best = rank.max(axis=1)
        rank = tl.where(rank == best[:, None], lowest, rank)
        # of a two's complement number, also a negative one, the low bits are its remainder
        chosen = (BLOCK_E - 1 - (best & (BLOCK_E - 1))).to(tl.int32)
        top = tl.load(row_ptr + chosen, mask=in_rows, other=0.0).to(tl.float32)
        tl.store(ids_ptr + t * A + a, chosen, mask=in_rows)
        tl.store(scores_ptr + t * A + a, 1.0 / (1.0 + tl.exp(-top)), mask=in_rows)


@dataclass(frozen=True)
class LaunchConfig:
    """One program routes `BLOCK_T` rows."""

    BLOCK_T: int
    BLOCK_E: int
    num_warps: int


def _launch_config(num_experts: int) -> LaunchConfig:
    """At most 512 logits per program. Chosen by shape; not yet measured on a GPU."""
    block = triton.next_power_of_2(num_experts)
    return LaunchConfig(BLOCK_T=min(16, 512 // block), BLOCK_E=block, num_warps=4)


@torch.library.custom_op("aerie::router", mutates_args=())
def _router_op(logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    check_launchable(logits)
    rows, num_experts = logits.shape
    ids_TA = logits.new_empty((rows, experts_per_token), dtype=torch.int32)
    scores_TA = logits.new_empty((rows, experts_per_token))
    config = _launch_config(num_experts)
    if rows > 0:
        _router_kernel[(triton.cdiv(rows, config.BLOCK_T),)](
            logits,
            ids_TA,
            scores_TA,
            logits.stride(0),
            rows,
            num_experts,
            A=experts_per_token,
            BLOCK_T=config.BLOCK_T,
            BLOCK_E=config.BLOCK_E,
            num_warps=config.num_warps,
        )
    return ids_TA, scores_TA


@_router_op.register_fake
def _(logits: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], experts_per_token)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


def router(logits_TE: Tensor, experts_per_token: int) -> Routing:
    """Routes every row of `logits_TE` to its `experts_per_token` best experts.

    Raises ValueError on a count, shape, dtype or layout the kernel would read wrongly.
    """
    check_dtype("logits_TE", logits_TE)
    if logits_TE.ndim != 2 or logits_TE.stride(-1) != 1:
        raise ValueError(
            f"logits_TE: must be [T, E] with a contiguous last dimension, "
            f"got {logits_TE.dtype} {tuple(logits_TE.shape)} strides {logits_TE.stride()}"
        )
    num_experts = logits_TE.shape[1]
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"logits_TE: must have 1 to {MAX_EXPERTS} experts, got {num_experts}")
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token: must be 1 to {num_experts}, got {experts_per_token}")
    return Routing(*_router_op(logits_TE, experts_per_token))
