"""Llama 4's routed experts on top of the shared one.

    y[t] = shared[t] + sum_a down_e(silu(gate) * up),   (gate | up) = (x[t] * score[t, a]) W_e

with e = ids[t, a]. The score multiplies the *input*, rounded to the model dtype, as in Hugging
Face's Llama 4 (SwiGLU lies between, so scaling the output would be another function). Only the
routed experts are read. Sums are float32; the scaled input, gate, up, silu, their product and the
routed sum are each rounded once to the model dtype, as in eager code.

Every (row, choice) pair streams its expert's columns as a matrix-vector product, because a
speculative step has few rows and mostly distinct experts; the programs of one column tile run side
by side, so rows that share an expert share its bytes in the cache. Long prompts deserve a grouped
product instead.

Letters: T rows, A experts per token, E experts, D hidden, F feed-forward width (F2 = 2 F columns).
"""

from collections import Counter
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable
from aerie.kernels.router import Routing
from aerie.kernels.stream_launch import read_ahead
from aerie.kernels.swiglu import swiglu_ref


def experts_ref(
    x_TD: Tensor, routing: Routing, gate_up_EDF2: Tensor, down_EFD: Tensor, shared_TD: Tensor
) -> Tensor:
    """The formula above in PyTorch; the rows of one expert are multiplied together."""
    ids, choices = routing.ids_TA.view(-1).tolist(), routing.ids_TA.shape[1]
    chosen_TD = x_TD if choices == 1 else x_TD.repeat_interleave(choices, dim=0)
    routed = _routed_ref(chosen_TD * routing.scores_TA.view(-1, 1), ids, gate_up_EDF2, down_EFD)
    if choices > 1:
        routed = routed.view(-1, choices, x_TD.shape[1]).sum(dim=1)
    return shared_TD + routed


def _routed_ref(pairs: Tensor, ids: list[int], gate_up_EDF2: Tensor, down_EFD: Tensor) -> Tensor:
    """Every pair through its expert. Sorted by expert, so that only the products are separate."""
    if not ids:
        return pairs
    if len(set(ids)) == 1:
        e = ids[0]
        return _times(_swiglu_halves(_times(pairs, gate_up_EDF2[e])), down_EFD[e])
    order = sorted(range(len(ids)), key=ids.__getitem__)
    counts = Counter(ids[pair] for pair in order)
    order_P = torch.tensor(order, dtype=torch.int64, device=pairs.device)
    mine = pairs.index_select(0, order_P).split(list(counts.values()))
    both = [_times(x, gate_up_EDF2[e]) for e, x in zip(counts, mine, strict=True)]
    inner = _swiglu_halves(torch.cat(both)).split(list(counts.values()))
    outer = [_times(x, down_EFD[e]) for e, x in zip(counts, inner, strict=True)]
    return torch.empty_like(pairs).index_copy_(0, order_P, torch.cat(outer))


def _times(x: Tensor, weight: Tensor) -> Tensor:
    read_ahead(weight)
    return x @ weight


def _swiglu_halves(gate_up_TF2: Tensor) -> Tensor:
    return swiglu_ref(*gate_up_TF2.chunk(2, dim=-1))


@triton.jit
def _experts_gate_up_kernel(
    x_ptr,  # [T, D]
    ids_ptr,  # [T, A]
    scores_ptr,  # [T, A]
    gate_up_ptr,  # [E, D, 2F]
    hidden_ptr,  # [T * A, F]
    stride_xt,
    D,
    F,
    A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    in_columns = f < F
    e = tl.load(ids_ptr + pair).to(tl.int64)
    score = tl.load(scores_ptr + pair).to(tl.float32)
    gate_ptr = gate_up_ptr + e * D * (2 * F) + f[None, :]
    gate = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)  # summed over its rows after the loop
    up = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_depth = d < D
        in_tile = in_depth[:, None] & in_columns[None, :]
        x = tl.load(x_ptr + (pair // A) * stride_xt + d, mask=in_depth, other=0.0)
        scaled = (x.to(tl.float32) * score).to(x_ptr.dtype.element_ty).to(tl.float32)[:, None]
        row_ptr = gate_ptr + d.to(tl.int64)[:, None] * (2 * F)
        gate += scaled * tl.load(row_ptr, mask=in_tile, other=0.0).to(tl.float32)
        up += scaled * tl.load(row_ptr + F, mask=in_tile, other=0.0).to(tl.float32)
    dtype = hidden_ptr.dtype.element_ty
    gate_sum = tl.sum(gate, axis=0).to(dtype).to(tl.float32)
    up_sum = tl.sum(up, axis=0).to(dtype).to(tl.float32)
    silu = (gate_sum / (1.0 + tl.exp(-gate_sum))).to(dtype).to(tl.float32)
    tl.store(hidden_ptr + pair * F + f, silu * up_sum, mask=in_columns)


@triton.jit
def _experts_down_kernel(
    hidden_ptr,  # [T * A, F]
    ids_ptr,  # [T, A]
    down_ptr,  # [E, F, D]
    shared_ptr,  # [T, D]
    y_ptr,  # [T, D]
    stride_st,
    D,
    F,
    A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_columns = d < D
    total = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    for a in range(A):
        pair = t * A + a
        e = tl.load(ids_ptr + pair).to(tl.int64)
        for start in range(0, F, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            in_depth = f < F
            in_tile = in_depth[:, None] & in_columns[None, :]
            hidden = tl.load(hidden_ptr + pair * F + f, mask=in_depth, other=0.0).to(tl.float32)
            row_ptr = down_ptr + (e * F + f)[:, None] * D + d[None, :]
            total += hidden[:, None] * tl.load(row_ptr, mask=in_tile, other=0.0).to(tl.float32)
    routed = tl.sum(total, axis=0).to(y_ptr.dtype.element_ty).to(tl.float32)
    shared = tl.load(shared_ptr + t * stride_st + d, mask=in_columns, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * D + d, shared + routed, mask=in_columns)


@dataclass(frozen=True)
class LaunchConfig:
    """Columns of one program and depth of one step of its sum, in both kernels."""

    BLOCK_COLUMNS: int
    BLOCK_DEPTH: int
    num_warps: int


def _launch_config() -> LaunchConfig:
    """64 x 64, whole cache lines of bfloat16. Chosen by shape; not yet measured on a GPU."""
    return LaunchConfig(BLOCK_COLUMNS=64, BLOCK_DEPTH=64, num_warps=4)


@torch.library.custom_op("aerie::experts", mutates_args=())
def _experts_op(
    x: Tensor, ids: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor
) -> Tensor:
    check_launchable(x)
    (rows, choices), (_, width, depth) = ids.shape, down.shape
    config = _launch_config()
    columns = config.BLOCK_COLUMNS
    hidden, y_TD = x.new_empty(rows * choices, width), x.new_empty(x.shape)
    if rows > 0:
        _experts_gate_up_kernel[(rows * choices, triton.cdiv(width, columns))](
            x, ids, scores, gate_up, hidden, x.stride(0), depth, width, A=choices,
            BLOCK_D=config.BLOCK_DEPTH, BLOCK_F=columns, num_warps=config.num_warps,
        )  # fmt: skip
        _experts_down_kernel[(rows, triton.cdiv(depth, columns))](
            hidden, ids, down, shared, y_TD, shared.stride(0), depth, width, A=choices,
            BLOCK_D=columns, BLOCK_F=config.BLOCK_DEPTH, num_warps=config.num_warps,
        )  # fmt: skip
    return y_TD


@_experts_op.register_fake
def _(x, ids, scores, gate_up, down, shared):
    return x.new_empty(x.shape)


def experts(
    x_TD: Tensor, routing: Routing, gate_up_EDF2: Tensor, down_EFD: Tensor, shared_TD: Tensor
) -> Tensor:
    """`shared_TD` plus the routed experts of every row of `x_TD`; returns a contiguous [T, D].

    Expert ids must lie in [0, E), as `router` gives them. Raises ValueError on a shape, dtype or
    layout the kernels would read wrongly.
    """
    _check(x_TD, routing, gate_up_EDF2, down_EFD, shared_TD)
    return _experts_op(x_TD, routing.ids_TA, routing.scores_TA, gate_up_EDF2, down_EFD, shared_TD)


def _check(x_TD: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, shared: Tensor) -> None:
    check_dtype("x_TD", x_TD)
    if x_TD.ndim != 2:
        raise ValueError(f"x_TD: must be [T, D], got {tuple(x_TD.shape)}")
    if down.ndim != 3:
        raise ValueError(f"down_EFD: must be [E, F, D], got {tuple(down.shape)}")
    (num_experts, width, _), (rows, depth) = down.shape, x_TD.shape
    shape_TA = (rows, routing.ids_TA.shape[-1])
    for name, tensor, shape, dtype, is_weight in (
        ("x_TD", x_TD, (rows, depth), x_TD.dtype, False),
        ("shared_TD", shared, (rows, depth), x_TD.dtype, False),
        ("routing.ids_TA", routing.ids_TA, shape_TA, torch.int32, True),
        ("routing.scores_TA", routing.scores_TA, shape_TA, x_TD.dtype, True),
        ("gate_up_EDF2", gate_up, (num_experts, depth, 2 * width), x_TD.dtype, True),
        ("down_EFD", down, (num_experts, width, depth), x_TD.dtype, True),
    ):
        laid_out = tensor.is_contiguous() if is_weight else tensor.stride(-1) == 1
        if tensor.shape != shape or tensor.dtype != dtype or not laid_out:
            raise ValueError(
                f"{name}: must be {dtype} {shape}, {'all' if is_weight else 'rows'} contiguous, "
                f"got {tensor.dtype} {tuple(tensor.shape)} strides {tensor.stride()}"
            )
