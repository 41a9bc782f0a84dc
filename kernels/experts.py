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

Letters: T rows, A experts per token, P = T * A pairs, E experts, D hidden, F feed-forward width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aerie.kernels.backend import check_launchable, rounded, widened
from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.expert_order import order_into, slots_for
from aerie.kernels.experts_checks import check_experts, check_quantized
from aerie.kernels.experts_down import launch_down
from aerie.kernels.experts_gate_up import launch_gate_up
from aerie.kernels.experts_launch import Call, LaunchConfig, product_config, tile_pairs
from aerie.kernels.experts_rows import quantized_rows
from aerie.kernels.quantize import Quantized, dequantized, quantize_ref
from aerie.kernels.read_ahead import read_ahead
from aerie.kernels.router import Routing
from aerie.kernels.swiglu import swiglu_halves_ref
from aerie.kernels.target import Target, target_of


def experts_ref(
    x_TD: Tensor,
    routing: Routing,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
    shared_TD: Tensor | None = None,
    first_expert: int = 0,
    quantized: Quantized | None = None,
) -> Tensor:
    """The formula above in PyTorch; the rows of one expert are multiplied together."""
    choices = routing.ids_TA.shape[1]
    rows, scores_P1 = x_TD, routing.scores_TA
    if choices > 1:
        scores_P1 = scores_P1.reshape(-1, 1)
    is_dynamic = gate_up.is_fp8 and gate_up.input_scale is None
    if is_dynamic:
        rows = dequantized(quantized or quantize_ref(x_TD, gate_up.is_blocked))
    rows_PD = rows if choices == 1 else rows.repeat_interleave(choices, dim=0)
    ids_P = routing.ids_TA.reshape(-1)
    if is_dynamic:
        routed = _routed_ref(rows_PD, widened(scores_P1), ids_P, first_expert, gate_up, down)
    else:
        routed = _routed_ref(rows_PD * scores_P1, None, ids_P, first_expert, gate_up, down)
    if choices > 1:
        routed = routed.view(-1, choices, x_TD.shape[1]).sum(dim=1)
    routed = rounded(routed, x_TD.dtype)
    return routed if shared_TD is None else routed.add_(shared_TD)


def _routed_ref(
    rows_PD: Tensor,
    factor_P1: Tensor | None,
    ids_P: Tensor,
    first_expert: int,
    gate_up: ExpertMatrix,
    down: ExpertMatrix,
) -> Tensor:
    """Every pair through its expert. Sorted by expert, so that only the products are separate."""
    ids, num_experts = ids_P.tolist(), gate_up.weight.shape[0]
    chosen = set(ids)
    if len(chosen) == 1 and 0 <= (expert := ids[0] - first_expert) < num_experts:
        product = _first_product(rows_PD, gate_up, expert)
        return _second_product(_activated(product, factor_P1), down, expert)
    used = [e for e in sorted(chosen) if 0 <= e - first_expert < num_experts]
    routed = torch.zeros_like(widened(rows_PD) if gate_up.is_fp8 else rows_PD)
    if not used:
        return routed
    numbers, sizes = [e - first_expert for e in used], [ids.count(e) for e in used]
    here_P = ids_P.argsort(stable=True)
    if sum(sizes) < len(ids):  # those of experts elsewhere stand around them
        here_P = here_P.narrow(0, sum(e < first_expert for e in ids), sum(sizes))
    mine = rows_PD.index_select(0, here_P).split_with_sizes(sizes)
    both = [_first_product(x, gate_up, e) for e, x in zip(numbers, mine, strict=True)]
    factor = None if factor_P1 is None else factor_P1[here_P]
    inner = _activated(torch.cat(both), factor).split_with_sizes(sizes)
    outer = [_second_product(x, down, e) for e, x in zip(numbers, inner, strict=True)]
    return routed.index_copy_(0, here_P, torch.cat(outer))


def _first_product(rows: Tensor, gate_up: ExpertMatrix, expert: int) -> Tensor:
    if gate_up.input_scale is not None:
        rows = dequantized(quantize_ref(rows, scale=static_scale(gate_up, expert)))
    return _times(rows, gate_up, expert)


def _second_product(inner: Tensor, down: ExpertMatrix, expert: int) -> Tensor:
    if down.is_fp8:
        inner = dequantized(quantize_ref(inner, True, static_scale(down, expert)))
    return _times(inner, down, expert)


def _times(rows: Tensor, matrix: ExpertMatrix, expert: int) -> Tensor:
    if matrix.is_fp8:
        return F.linear(rows, matrix.rows_of(expert))
    weight = matrix.weight[expert]
    read_ahead(weight)
    return F.linear(rows, weight)


def _activated(product: Tensor, factor: Tensor | None) -> Tensor:
    return swiglu_halves_ref(product if factor is None else product * factor)


def static_scale(matrix: ExpertMatrix, expert: int) -> Tensor | None:
    """Static activation scale of one expert, [1]."""
    scales = matrix.input_scale
    return None if scales is None else scales[expert : expert + 1] if len(scales) > 1 else scales


def _launch_config(
    target: Target,
    pairs: int,
    experts: int,
    depth: int,
    width: int,
    itemsize: int,
    is_fp8: bool,
    is_blocked: bool = False,
) -> LaunchConfig:
    """Tiles and splits of both products, from shapes alone (`experts_launch`)."""
    return LaunchConfig(
        tile_pairs(target, pairs, experts, is_fp8, is_blocked),
        product_config(
            target, pairs, experts, 2 * width, depth, itemsize, is_fp8, True, is_blocked
        ),
        product_config(target, pairs, experts, depth, width, itemsize, is_fp8, False, is_blocked),
    )


@torch.library.custom_op("aerie::experts", mutates_args=())
def _experts_op(
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
    first = ExpertMatrix(gate_up, gate_up_scale, gate_up_input_scale)
    second = ExpertMatrix(down, down_scale, down_input_scale)
    config = _launch_config(
        target_of(x), pairs, experts, depth, width, x.itemsize, first.is_fp8, first.is_blocked
    )
    slots = slots_for(pairs, experts, config.tile_pairs)
    call = Call(ids, scores, first_expert, ids.new_empty(pairs), ids.new_empty((3, slots)), config)
    order_into(ids, call.pairs, call.tiles, experts, first_expert, config.tile_pairs)
    given = None if codes is None or code_scales is None else Quantized(codes, code_scales)
    rows = quantized_rows(call, x, first, given) if first.is_fp8 else None
    return launch_down(call, launch_gate_up(call, x, rows, first, second), second, x, shared)


@_experts_op.register_fake
def _(x, ids, scores, gate_up, gate_up_scale, gate_up_input_scale, down, down_scale,
      down_input_scale, shared, codes, code_scales, first_expert):  # fmt: skip
    return x.new_empty(x.shape)


def experts(
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
    check_experts(x_TD, routing, gate_up, down, shared_TD, first_expert)
    if quantized is not None:
        check_quantized(quantized, x_TD, gate_up)
    return _experts_op(
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
