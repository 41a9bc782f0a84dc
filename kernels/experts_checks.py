"""What `experts` refuses of its arguments."""

import torch
from torch import Tensor

from aerie.kernels.backend import check_dtype
from aerie.kernels.expert_matrix import ExpertMatrix, check_matrix
from aerie.kernels.expert_order import check_pairs
from aerie.kernels.quantize import FP8, Quantized, scales_per_row
from aerie.kernels.router import Routing


def check_experts(
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


def check_quantized(quantized: Quantized, x_TD: Tensor, gate_up: ExpertMatrix) -> None:
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
