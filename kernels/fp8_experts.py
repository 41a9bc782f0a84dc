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

import torch
import torch.nn.functional as F
from torch import Tensor

from aerie.kernels.backend import rounded, widened
from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.quantize import Quantized, dequantized, quantize_ref
from aerie.kernels.router import Routing
from aerie.kernels.swiglu import swiglu_ref


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
