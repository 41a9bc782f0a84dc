"""The rows of `experts` as FP8 codes: one quantisation for all experts of a row, if scales allow.

Letters: T rows, A experts per token, P = T * A pairs, E experts, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.experts_launch import Call
from aerie.kernels.quantize import (
    _GROUP,
    FP8,
    Quantized,
    quantize_into,
    row_blocks,
    scales_per_row,
    store_quantized,
)
from aerie.kernels.weight_stream import OFF, ON


@triton.jit(do_not_specialize=["first_expert"])
def _experts_rows_kernel(
    x_ptr,  # [T, D]
    ids_ptr,  # [T, A]
    scores_ptr,  # [T, A]
    input_scale_ptr,  # [E] or [1]
    codes_ptr,  # [P, D]
    scales_ptr,  # [P, 1]
    stride_xt,
    stride_ie,
    D,
    E,
    first_expert,
    A: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Codes of x * score, one row per pair, under the static scale of its expert."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64) - first_expert
    expert = tl.where((expert >= 0) & (expert < E), expert, 0)
    score = tl.load(scores_ptr + pair).to(tl.float32)
    d = tl.arange(0, BLOCK_G)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    x = tl.load(x_ptr + pair // A * stride_xt + d, mask=d < D, other=0.0).to(tl.float32)
    x = (x * score).to(x_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.load(input_scale_ptr + expert * stride_ie)
    store_quantized(x, codes_ptr + pair * D, scales_ptr + pair, scale, D, OFF, ON, BLOCK_G)


def quantized_rows(
    call: Call, x: Tensor, matrix: ExpertMatrix, given: Quantized | None
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
    _experts_rows_kernel[(pairs,)](
        x, call.ids, call.scores, static, quantized.codes_TD.view(torch.uint8), quantized.scales_TN,
        x.stride(0), int(static.numel() > 1), depth, len(matrix.weight), call.first_expert,
        A=call.ids.shape[1], BLOCK_G=config.BLOCK_G, num_warps=config.num_warps,
    )  # fmt: skip
    return quantized
