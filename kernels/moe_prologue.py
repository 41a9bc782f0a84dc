"""What stands in front of a mixture of experts, in one launch: norm, router, quantisation.

    s = x + residual                        (rounded to the input dtype)
    h = weight * round(s / rms(s))          `rms_norm.py`
    ids, scores = router(h W^T)             `router.py`; logits are rounded to the input dtype
    codes, scales = quantize(h)             `quantize.py`, where the experts' weights are FP8

A program has one row, which it reads once and keeps: alone each step would write it and read it
again, and cost a launch. The router's weight, 164 KB at 16 experts, comes from the cache, once per
row; so where rows or experts are many the logits are a product of their own (`routes_inside`).

Letters: T rows, D hidden, E experts, A experts per token; N scales per row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable
from aerie.kernels.linear import linear_ref
from aerie.kernels.quantize import (
    _GROUP,
    FP8,
    Codes,
    Quantized,
    quantize_ref,
    row_blocks,
    scales_per_row,
    store_quantized,
)
from aerie.kernels.rms_norm import add_rms_norm_ref, check_norm
from aerie.kernels.router import MAX_EXPERTS, Routing, logit_rank, router_ref
from aerie.kernels.weight_stream import OFF

TILE_E = 4  # experts whose weights are on their way together
MOST_INSIDE = 64 * 16  # rows times experts: 64 rows read 16 experts' weights, 10 MB, from the cache


@dataclass(frozen=True)
class MoEEntry:
    """`normed_TD` feeds the experts, as `quantized` too if asked; `residual_TD` goes on."""

    normed_TD: Tensor
    residual_TD: Tensor
    routing: Routing
    quantized: Quantized | None


def moe_prologue_ref(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    router_ED: Tensor,
    experts_per_token: int,
    codes: Codes = "none",
) -> MoEEntry:
    """The formula above in PyTorch."""
    norm = add_rms_norm_ref(x_TD, residual_TD, weight_D, eps)
    routing = router_ref(linear_ref(norm.normed_TD, router_ED), experts_per_token)
    quantized = None if codes == "none" else quantize_ref(norm.normed_TD, codes == "group")
    return MoEEntry(norm.normed_TD, norm.residual_TD, routing, quantized)


@triton.jit
def _moe_prologue_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D]
    weight_ptr,  # [D]
    router_ptr,  # [E, D], read if ROUTES
    normed_ptr,  # [T, D]
    sum_ptr,  # [T, D]
    ids_ptr,  # [T, A], written if ROUTES
    scores_ptr,  # [T, A], written if ROUTES
    codes_ptr,  # [T, D], written if QUANTIZES
    scales_ptr,  # [T, N], written if QUANTIZES
    stride_xt,
    stride_rt,
    D,
    E,
    N,
    eps,
    A: tl.constexpr,
    ROUTES: tl.constexpr,
    QUANTIZES: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE_E: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_G)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    in_row = d < D
    x = tl.load(x_ptr + t * stride_xt + d, mask=in_row, other=0.0)
    dtype = x.dtype
    residual = tl.load(residual_ptr + t * stride_rt + d, mask=in_row, other=0.0)
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    tl.store(sum_ptr + t * D + d, total, mask=in_row)
    x = total.to(tl.float32)
    mean_square = tl.sum(tl.sum(x * x, axis=1), axis=0) / D
    normed = (x / tl.sqrt(mean_square + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=in_row, other=0.0).to(tl.float32)
    normed = (normed * weight).to(dtype)
    tl.store(normed_ptr + t * D + d, normed, mask=in_row)
    normed = normed.to(tl.float32)
    if QUANTIZES:
        store_quantized(
            normed, codes_ptr + t * D, scales_ptr + t * N, 0.0, D, GROUPED, OFF, BLOCK_G
        )
    if ROUTES:
        logits = _logits(normed, router_ptr, d, in_row, D, E, BLOCK_E, TILE_E)
        logits = logits.to(dtype).to(tl.float32)
        e = tl.arange(0, BLOCK_E)
        lowest = -0x8000000000000000
        rank = tl.where(e < E, logit_rank(logits, e, BLOCK_E), lowest)
        for a in range(A):
            best = rank.max(axis=0)
            is_best = rank == best
            chosen = tl.sum(tl.where(is_best, e, 0), axis=0)
            top = tl.sum(tl.where(is_best, logits, 0.0), axis=0)
            rank = tl.where(is_best, lowest, rank)
            tl.store(ids_ptr + t * A + a, chosen)
            tl.store(scores_ptr + t * A + a, 1.0 / (1.0 + tl.exp(-top)))


@triton.jit
def _logits(
    normed, router_ptr, d, in_row, D, E, BLOCK_E: tl.constexpr, TILE_E: tl.constexpr
):  # fmt: skip
    """float32 [BLOCK_E]: the row times every expert's router weights, `TILE_E` at a time."""
    e = tl.arange(0, BLOCK_E)
    logits = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, E, TILE_E):
        own = first + tl.arange(0, TILE_E)
        offset = own.to(tl.int64)[:, None, None] * D + d[None, :, :]
        mask = (own < E)[:, None, None] & in_row[None, :, :]
        weight = tl.load(router_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        products = tl.sum(tl.sum(weight * normed[None, :, :], axis=2), axis=1)
        is_own = e[:, None] == own[None, :]
        logits += tl.sum(tl.where(is_own, products[None, :], 0.0), axis=1)
    return logits


@dataclass(frozen=True)
class LaunchConfig:
    """One row per program; whether it computes the logits too."""

    BLOCK_G: int
    BLOCK_E: int
    ROUTES: bool
    num_warps: int


def routes_inside(rows: int, experts: int) -> bool:
    """Whether every row's program computes its own logits, or a product behind it all of them.

    Chosen by what is read from the cache; not yet measured on a GPU.
    """
    return rows * experts <= MOST_INSIDE and experts <= 32


def _launch_config(rows: int, width: int, experts: int) -> LaunchConfig:
    """Eight elements per thread, 1 to 16 warps. Chosen by shape; not yet measured on a GPU."""
    row, bins = row_blocks(width), max(TILE_E, triton.next_power_of_2(experts))
    return LaunchConfig(row.BLOCK_G, bins, routes_inside(rows, experts), row.num_warps)


@torch.library.custom_op("aerie::moe_prologue", mutates_args=())
def _moe_prologue_op(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    router: Tensor,
    experts_per_token: int,
    codes: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_launchable(x)
    (rows, width), experts = x.shape, len(router)
    config = _launch_config(rows, width, experts)
    normed, total, ids, scores, row_codes, scales = _outputs(x, experts_per_token, codes)
    if rows > 0:
        _moe_prologue_kernel[(rows,)](
            x,
            residual,
            weight,
            router,
            normed,
            total,
            ids,
            scores,
            row_codes.view(torch.uint8),
            scales,
            x.stride(0),
            residual.stride(0),
            width,
            experts,
            scales.shape[1],
            eps,
            A=experts_per_token,
            ROUTES=config.ROUTES,
            QUANTIZES=codes != "none",
            GROUPED=codes == "group",
            BLOCK_G=config.BLOCK_G,
            BLOCK_E=config.BLOCK_E,
            TILE_E=TILE_E,
            num_warps=config.num_warps,
        )
        if not config.ROUTES:
            logits = torch.ops.aerie.linear(normed, router, None, None)
            ids, scores = torch.ops.aerie.router(logits, experts_per_token)
    return normed, total, ids, scores, row_codes, scales


def _outputs(
    x: Tensor, experts_per_token: int, codes: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    coded, per_row = (0, 0) if codes == "none" else (width, scales_per_row(width, codes == "group"))
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        x.new_empty((rows, experts_per_token), dtype=torch.int32),
        x.new_empty((rows, experts_per_token)),
        x.new_empty((rows, coded), dtype=FP8),
        x.new_empty((rows, per_row), dtype=torch.float32),
    )


@_moe_prologue_op.register_fake
def _(x, residual, weight, eps, router, experts_per_token, codes):
    return _outputs(x, experts_per_token, codes)


def moe_prologue(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    router_ED: Tensor,
    experts_per_token: int,
    codes: Codes = "none",
) -> MoEEntry:
    """Residual add, RMSNorm, routing and, by `codes`, FP8 codes of every row of `x_TD` [T, D].

    `codes` "row" gives a scale per row, "group" one per 128 columns: what `experts` takes as
    `quantized`. Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    check_norm(x_TD, weight_D)
    if residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype:
        raise ValueError(
            f"residual_TD: must match x_TD {tuple(x_TD.shape)} {x_TD.dtype}, "
            f"got {tuple(residual_TD.shape)} {residual_TD.dtype}"
        )
    width, experts = x_TD.shape[1], len(router_ED)
    if tuple(router_ED.shape) != (experts, width) or not router_ED.is_contiguous():
        raise ValueError(
            f"router_ED: must be a contiguous [E, {width}], got {tuple(router_ED.shape)} strides "
            f"{router_ED.stride()}"
        )
    if router_ED.dtype != x_TD.dtype or not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(
            f"router_ED: must be {x_TD.dtype} of 1 to {MAX_EXPERTS} experts, "
            f"got {router_ED.dtype} of {experts}"
        )
    if not 1 <= experts_per_token <= experts:
        raise ValueError(f"experts_per_token: must be 1 to {experts}, got {experts_per_token}")
    if codes not in ("none", "row", "group"):
        raise ValueError(f"codes: must be 'none', 'row' or 'group', got {codes!r}")
    normed, total, ids, scores, row_codes, scales = _moe_prologue_op(
        x_TD, residual_TD.contiguous(), weight_D, eps, router_ED, experts_per_token, codes
    )
    quantized = None if codes == "none" else Quantized(row_codes, scales)
    return MoEEntry(normed, total, Routing(ids, scores), quantized)
