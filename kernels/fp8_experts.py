"""Llama 4's routed experts, FP8 or not, on top of the shared one.

    y[t] = shared[t] + sum_a down_e(silu(gate) * up),    (gate | up) = score[t, a] * (x[t] W_e^T)

with e = ids[t, a], over those experts that are here (`first_expert` and as many as the weights
have): an expert-parallel or tensor-parallel part is a smaller matrix, and its y a summand. Llama 4
scales the *input* of an expert by its score; SwiGLU lies between, so this is not a scaling of its
output. The score is applied to the float32 product instead, where it commutes, so that a row is
read, and quantised, once for all of its experts and for the shared one.

Unquantised: gate, up, silu, their product and the routed sum are each rounded once to the dtype,
as in eager code, which rounds the scaled input in addition.

FP8 (e4m3 weights, `expert_matrix.py`): x becomes codes with a scale per row, or per 128 columns if
the weights have block scales; silu(gate) * up becomes codes with a scale per 128 columns, whatever
the weights have: that group lies inside one tile, and is never coarser than a row's. Products of
codes are summed in float32, scales multiply the sums, and the result is rounded once. Where
`gate_up.input_scale` is static, x * score is quantised instead (rounded to the dtype in between):
such a scale was calibrated on the scaled input and would cut off the unscaled one.

Letters: T rows, A experts per token, E experts, D hidden, F feed-forward width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from aerie.kernels.backend import check_dtype, check_launchable, rounded, widened
from aerie.kernels.expert_matrix import ExpertMatrix, check_matrix
from aerie.kernels.expert_order import check_pairs, order_into, slots_for
from aerie.kernels.fp8_experts_kernel import (
    _fp8_experts_down_kernel,
    _fp8_experts_gate_up_kernel,
    _fp8_experts_sum_kernel,
    _scaled_rows_kernel,
)
from aerie.kernels.fp8_experts_launch import (
    LaunchConfig,
    product_config,
    split_scratch,
    tile_pairs,
)
from aerie.kernels.quantize import (
    FP8,
    GROUP,
    Quantized,
    dequantized,
    quantize_into,
    quantize_ref,
    row_blocks,
    scales_per_row,
)
from aerie.kernels.router import Routing
from aerie.kernels.swiglu import swiglu_ref

SUM_COLUMNS = 1024  # of one program of the sum over choices


def fp8_experts_ref(
    x_TD: Tensor,
    routing: Routing,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    shared_TD: Tensor | None = None,
    first_expert: int = 0,
    quantized: Quantized | None = None,
) -> Tensor:
    """The formula above in PyTorch, one pass per distinct expert of the step."""
    choices = routing.ids_TA.shape[1]
    ids = [i - first_expert for i in routing.ids_TA.flatten().tolist()]
    here = {i for i in ids if 0 <= i < len(gate_up.weight)}
    rows_P = x_TD if choices == 1 else x_TD.repeat_interleave(choices, dim=0)
    scores_P1 = routing.scores_TA.reshape(-1, 1)
    if quantized is not None and choices > 1:
        codes, scales = quantized.codes_TD, quantized.scales_TN
        quantized = Quantized(*(x.repeat_interleave(choices, dim=0) for x in (codes, scales)))
    if here == set(ids) and len(here) == 1:
        routed = _expert_ref(rows_P, scores_P1, quantized, gate_up, down, ids[0])
    else:
        routed = torch.zeros_like(widened(rows_P) if gate_up.is_fp8 else rows_P)
        for e in sorted(here):
            mine = torch.tensor([p for p, i in enumerate(ids) if i == e], device=x_TD.device)
            own = quantized and Quantized(quantized.codes_TD[mine], quantized.scales_TN[mine])
            y = _expert_ref(rows_P[mine], scores_P1[mine], own, gate_up, down, e)
            routed.index_copy_(0, mine, y)
    if choices > 1:
        routed = routed.view(-1, choices, x_TD.shape[1]).sum(dim=1)
    routed = rounded(routed, x_TD.dtype)
    return routed if shared_TD is None else shared_TD + routed


def _expert_ref(
    rows_PD: Tensor,
    scores_P1: Tensor,
    quantized: Quantized | None,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    expert: int,
) -> Tensor:
    """One expert on its rows."""
    weight = gate_up.rows_of(expert)
    if not gate_up.is_fp8:
        gate_PF, up_PF = F.linear(rows_PD * scores_P1, weight).chunk(2, dim=-1)
        return F.linear(swiglu_ref(gate_PF, up_PF), down.rows_of(expert))
    static = static_scale(gate_up, expert)
    if static is not None:
        rows = dequantized(quantize_ref(rows_PD * scores_P1, scale=static))
        product = F.linear(rows, weight)
    else:
        rows = dequantized(quantized or quantize_ref(rows_PD, grouped=gate_up.is_blocked))
        product = F.linear(rows, weight) * widened(scores_P1)
    gate_PF, up_PF = product.chunk(2, dim=-1)
    inner = quantize_ref(swiglu_ref(gate_PF, up_PF), True, static_scale(down, expert))
    return F.linear(dequantized(inner), down.rows_of(expert))


def static_scale(matrix: ExpertMatrix, expert: int) -> Tensor | None:
    """Static activation scale of one expert, [1]."""
    scales = matrix.input_scale
    return None if scales is None else scales[expert : expert + 1] if len(scales) > 1 else scales


def _launch_config(
    pairs: int, experts: int, depth: int, width: int, itemsize: int, is_fp8: bool
) -> LaunchConfig:
    """Tiles and splits of both products, from shapes alone (`fp8_experts_launch`)."""
    return LaunchConfig(
        tile_pairs(pairs, experts, is_fp8),
        product_config(pairs, experts, 2 * width, depth, itemsize, is_fp8, has_gate=True),
        product_config(pairs, experts, depth, width, itemsize, is_fp8, has_gate=False),
    )


@dataclass(frozen=True)
class _Call:
    """What both launches of one call read."""

    ids: Tensor
    scores: Tensor
    first_expert: int
    pairs: Tensor
    tiles: Tensor
    config: LaunchConfig


@torch.library.custom_op("aerie::fp8_experts", mutates_args=())
def _fp8_experts_op(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    gate_up_input_scale: Tensor | None,
    down: Tensor,
    down_scale: Tensor | None,
    down_input_scale: Tensor | None,
    shared: Tensor | None,
    codes: Tensor | None,
    code_scales: Tensor | None,
    first_expert: int,
) -> Tensor:
    check_launchable(x)
    (experts, depth, width), pairs = down.shape, ids.numel()
    if pairs == 0:
        return x.new_empty(x.shape)
    first, second = (
        ExpertMatrix(gate_up, gate_up_scale, gate_up_input_scale),
        ExpertMatrix(down, down_scale, down_input_scale),
    )
    config = _launch_config(pairs, experts, depth, width, x.itemsize, first.is_fp8)
    slots = slots_for(pairs, experts, config.tile_pairs)
    call = _Call(ids, scores, first_expert, ids.new_empty(pairs), ids.new_empty((3, slots)), config)
    order_into(ids, call.pairs, call.tiles, experts, first_expert, config.tile_pairs)
    quantized = None
    if first.is_fp8:
        given = None if codes is None or code_scales is None else Quantized(codes, code_scales)
        quantized = _quantized_rows(call, x, first, given)
    hidden = _launch_gate_up(call, x, quantized, first, second)
    return _launch_down(call, hidden, second, x, shared)


@_fp8_experts_op.register_fake
def _(x, ids, scores, gate_up, gate_up_scale, gate_up_input_scale, down, down_scale,
      down_input_scale, shared, codes, code_scales, first_expert):  # fmt: skip
    return x.new_empty(x.shape)


def _quantized_rows(
    call: _Call, x: Tensor, matrix: ExpertMatrix, given: Quantized | None
) -> Quantized:
    """Codes of the rows, one per pair where the scale is static, else one per row."""
    static, (rows, depth) = matrix.input_scale, x.shape
    if static is None and given is not None:
        return given
    if static is None:
        scales = x.new_empty((rows, scales_per_row(depth, matrix.is_blocked)), dtype=torch.float32)
        quantized = Quantized(x.new_empty(x.shape, dtype=FP8), scales)
        quantize_into(quantized, x, matrix.is_blocked)
        return quantized
    pairs, config = call.pairs.numel(), row_blocks(depth)
    quantized = Quantized(
        x.new_empty((pairs, depth), dtype=FP8), x.new_empty((pairs, 1), dtype=torch.float32)
    )
    _scaled_rows_kernel[(pairs,)](
        x, call.ids, call.scores, static, quantized.codes_TD.view(torch.uint8), quantized.scales_TN,
        x.stride(0), int(static.numel() > 1), depth, len(matrix.weight), call.first_expert,
        A=call.ids.shape[1], BLOCK_G=config.BLOCK_G, num_warps=config.num_warps,
    )  # fmt: skip
    return quantized


def _launch_gate_up(
    call: _Call, x: Tensor, quantized: Quantized | None, matrix: ExpertMatrix, down: ExpertMatrix
) -> Quantized:
    """The rows behind SwiGLU, as codes with scales where the weights are FP8."""
    pairs, slots, config = call.pairs.numel(), call.tiles.shape[1], call.config.gate_up
    width, depth, static = down.weight.shape[2], down.weight.shape[1], down.input_scale
    hidden = x.new_empty((pairs, width), dtype=x.dtype if quantized is None else FP8)
    groups = triton.cdiv(width, GROUP)
    hidden_scales = x if quantized is None else x.new_empty((pairs, groups), dtype=torch.float32)
    tiles = triton.cdiv(width, config.BLOCK_N // 2)
    partials, arrivals = split_scratch(x, slots, tiles, config)
    rows = x if quantized is None else quantized.codes_TD
    scales = x if quantized is None else quantized.scales_TN
    _fp8_experts_gate_up_kernel[(slots * tiles, config.SPLITS)](
        rows,
        scales,
        call.scores,
        call.pairs,
        call.tiles,
        matrix.weight,
        matrix.weight if matrix.scale is None else matrix.scale,
        x if static is None else static,
        hidden if quantized is None else hidden.view(torch.uint8),
        hidden_scales,
        partials,
        arrivals,
        rows.stride(0),
        scales.stride(0),
        *_scale_strides(matrix),
        0 if static is None else int(static.numel() > 1),
        slots,
        depth,
        width,
        A=call.ids.shape[1],
        X_PER_PAIR=matrix.input_scale is not None,
        X_GROUPED=matrix.is_blocked,
        W_BLOCKED=matrix.is_blocked,
        INNER_IS_STATIC=static is not None,
        **config.options,
    )
    return Quantized(hidden, hidden_scales)


def _launch_down(
    call: _Call, hidden: Quantized, matrix: ExpertMatrix, x: Tensor, shared: Tensor | None
) -> Tensor:
    """The routed sum and the shared output."""
    (rows, choices), slots, config = call.ids.shape, call.tiles.shape[1], call.config.down
    _, depth, width = matrix.weight.shape
    y_TD = x.new_empty(x.shape)
    routed = y_TD if choices == 1 else x.new_empty((rows * choices, depth), dtype=torch.float32)
    tiles = triton.cdiv(depth, config.BLOCK_N)
    partials, arrivals = split_scratch(x, slots, tiles, config)
    addend = x if shared is None else shared
    _fp8_experts_down_kernel[(slots * tiles, config.SPLITS)](
        hidden.codes_TD,
        hidden.scales_TN,
        call.pairs,
        call.tiles,
        matrix.weight,
        matrix.weight if matrix.scale is None else matrix.scale,
        addend,
        routed,
        partials,
        arrivals,
        addend.stride(0),
        *_scale_strides(matrix),
        slots,
        depth,
        width,
        IS_FINAL=choices == 1,
        HAS_SHARED=shared is not None,
        W_BLOCKED=matrix.is_blocked,
        **config.options,
    )
    if choices > 1:
        _fp8_experts_sum_kernel[(rows, triton.cdiv(depth, SUM_COLUMNS))](
            routed, addend, y_TD, addend.stride(0), depth, A=choices,
            HAS_SHARED=shared is not None, BLOCK_D=SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
    return y_TD


def _scale_strides(matrix: ExpertMatrix) -> tuple[int, int]:
    """Steps from expert to expert and from row (or block of rows) to row of the weight's scale."""
    if matrix.scale is None:
        return 0, 0
    return matrix.scale.stride(0), matrix.scale.stride(1) if matrix.scale.shape[1] > 1 else 0


def fp8_experts(
    x_TD: Tensor,
    routing: Routing,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    shared_TD: Tensor | None = None,
    first_expert: int = 0,
    quantized: Quantized | None = None,
) -> Tensor:
    """The experts of every row of `x_TD`, plus `shared_TD`; returns a contiguous [T, D].

    `gate_up` is [E, 2F, D], gate rows first, `down` [E, D, F]; both FP8 or both in the dtype of
    `x_TD`. They are the experts `first_expert` to `first_expert + E - 1`; pairs routed to others
    add nothing. At most 2^20 pairs. `quantized` may give the codes of `x_TD` where FP8 weights
    have no static `input_scale`: per row, or per 128 columns if their scales are blocks. Raises
    ValueError naming the tensor and the rule it breaks.
    """
    _check(x_TD, routing, gate_up, down, shared_TD, first_expert)
    if quantized is not None:
        _check_quantized(quantized, x_TD, gate_up)
    return _fp8_experts_op(
        x_TD,
        routing.ids_TA,
        routing.scores_TA,
        gate_up.weight,
        gate_up.scale,
        gate_up.input_scale,
        down.weight,
        down.scale,
        down.input_scale,
        shared_TD,
        None if quantized is None else quantized.codes_TD,
        None if quantized is None else quantized.scales_TN,
        first_expert,
    )


def _check(
    x_TD: Tensor,
    routing: Routing,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    shared_TD: Tensor | None,
    first_expert: int,
) -> None:
    check_dtype("x_TD", x_TD)
    if x_TD.ndim != 2 or x_TD.stride(-1) != 1:
        raise ValueError(
            f"x_TD: must be [T, D] with a contiguous last dimension, "
            f"got {tuple(x_TD.shape)} strides {x_TD.stride()}"
        )
    if down.weight.ndim != 3:
        raise ValueError(f"down.weight: must be [E, D, F], got {tuple(down.weight.shape)}")
    (experts, _, width), (rows, depth) = down.weight.shape, x_TD.shape
    check_matrix("gate_up", gate_up, experts, 2 * width, depth, x_TD)
    check_matrix("down", down, experts, depth, width, x_TD)
    if gate_up.is_fp8 != down.is_fp8:
        raise ValueError(
            f"down.weight: must be in the format of gate_up.weight, {gate_up.weight.dtype}, "
            f"got {down.weight.dtype}"
        )
    if shared_TD is not None and (
        shared_TD.shape != x_TD.shape or shared_TD.dtype != x_TD.dtype or shared_TD.stride(-1) != 1
    ):
        raise ValueError(
            f"shared_TD: must be {x_TD.dtype} {tuple(x_TD.shape)} with contiguous rows, "
            f"got {shared_TD.dtype} {tuple(shared_TD.shape)} strides {shared_TD.stride()}"
        )
    shape = (rows, routing.ids_TA.shape[-1])
    for name, tensor, dtype in (
        ("routing.ids_TA", routing.ids_TA, torch.int32),
        ("routing.scores_TA", routing.scores_TA, x_TD.dtype),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: must be a contiguous {dtype} {shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} strides {tensor.stride()}"
            )
    check_pairs("routing.ids_TA", routing.ids_TA.numel(), experts, first_expert)


def _check_quantized(quantized: Quantized, x_TD: Tensor, gate_up: ExpertMatrix) -> None:
    if not gate_up.is_fp8 or gate_up.input_scale is not None:
        raise ValueError("quantized: must come with FP8 weights without a static input_scale only")
    codes, scales = quantized.codes_TD, quantized.scales_TN
    shape = (x_TD.shape[0], scales_per_row(x_TD.shape[1], gate_up.is_blocked))
    for name, tensor, dtype, wanted in (
        ("codes_TD", codes, FP8, tuple(x_TD.shape)),
        ("scales_TN", scales, torch.float32, shape),
    ):
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"quantized.{name}: must be a contiguous {dtype} {wanted}, "
                f"got {tensor.dtype} {tuple(tensor.shape)} strides {tensor.stride()}"
            )
