"""The weights of all experts of a layer for one of its two products, and what is refused of them.

Output-major, [E, N, K]: a row of K contiguous numbers per output, as per-expert checkpoints store
them and as the kernels stream them. FP8 weights (float8_e4m3fn) come with a float32 scale:

    [E, 1, 1] per tensor   [E, N, 1] per channel   [E, ceil(N / 128), ceil(K / 128)] per block

Letters: E experts, N outputs, K inputs.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from aerie.kernels.backend import widened
from aerie.kernels.quantize import FP8, GROUP, Codes
from aerie.kernels.target import lacks_fp8

NEEDS_SCALE = "; raw codes have no scale of their own, pass the checkpoint's weight_scale"


@dataclass(frozen=True)
class ExpertMatrix:
    """`weight` [E, N, K] in the model dtype, or FP8 with `scale` (shapes above).

    `input_scale`, float32 [E] or [1], is a static scale of the activations; None means that FP8
    activations are scaled by their own maximum, per row or, with block scales, per 128 columns.
    The kernels need contiguous weights; the reference takes any strides.
    """

    weight: Tensor
    scale: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.weight.dtype == FP8

    @property
    def is_blocked(self) -> bool:
        """Whether the scale has blocks, more than one."""
        if self.scale is None or self.scale.shape[1:].numel() == 1:
            return False
        return tuple(self.scale.shape) == block_shape(self.weight)

    @property
    def row_codes(self) -> Codes:
        """How rows are quantised for all experts at once; a static scale takes them scaled."""
        if not self.is_fp8 or self.input_scale is not None:
            return "none"
        return "group" if self.is_blocked else "row"

    def rows_of(self, expert: int) -> Tensor:
        """Weights [N, K] of one expert, dequantised in the precision of their scale."""
        weight = self.weight[expert]
        if self.scale is None:
            return weight
        scale = widened(self.scale[expert])
        if self.is_blocked:
            scale = scale.repeat_interleave(GROUP, 0)[: weight.shape[0]]
            scale = scale.repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
        return weight.to(scale.dtype) * scale


def block_shape(weight: Tensor) -> tuple[int, int, int]:
    experts, outputs, inputs = weight.shape
    return experts, triton.cdiv(outputs, GROUP), triton.cdiv(inputs, GROUP)


def check_matrix(
    name: str, matrix: ExpertMatrix, experts: int, outputs: int, inputs: int, like: Tensor
) -> None:
    """Raises ValueError unless `matrix` is contiguous [E, outputs, inputs] as the class says."""
    weight = matrix.weight
    if weight.dtype not in (like.dtype, FP8):
        raise ValueError(
            f"{name}.weight: must be {like.dtype} like the rows, or {FP8} with a scale, "
            f"got {weight.dtype}; other FP8 formats must be converted first"
        )
    if tuple(weight.shape) != (experts, outputs, inputs):
        raise ValueError(
            f"{name}.weight: must be output-major [{experts}, {outputs}, {inputs}], "
            f"got {tuple(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"{name}.weight: must be contiguous, got strides {weight.stride()}")
    _check_device(f"{name}.weight", weight, like)
    _check_scale(name, matrix, like)
    _check_input_scale(name, matrix, like)
    if matrix.is_fp8:
        _check_capability(name, weight)


def _check_scale(name: str, matrix: ExpertMatrix, like: Tensor) -> None:
    weight, scale = matrix.weight, matrix.scale
    if matrix.is_fp8 != (scale is not None):
        given = f"none for {FP8}{NEEDS_SCALE}" if scale is None else f"one for {weight.dtype}"
        raise ValueError(f"{name}.scale: must come with FP8 weights and only then, got {given}")
    if scale is None:
        return
    experts, outputs, _ = weight.shape
    shapes = ((experts, 1, 1), (experts, outputs, 1), block_shape(weight))
    if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
        raise ValueError(
            f"{name}.scale: must be float32 {shapes[0]} per tensor, {shapes[1]} per channel or "
            f"{shapes[2]} per {GROUP} x {GROUP} block, got {scale.dtype} {tuple(scale.shape)}"
        )
    if not scale.is_contiguous():
        raise ValueError(f"{name}.scale: must be contiguous, got strides {scale.stride()}")
    _check_device(f"{name}.scale", scale, like)


def _check_input_scale(name: str, matrix: ExpertMatrix, like: Tensor) -> None:
    scale = matrix.input_scale
    if scale is None:
        return
    if not matrix.is_fp8:
        raise ValueError(
            f"{name}.input_scale: must come with FP8 weights only, got one for "
            f"{matrix.weight.dtype}"
        )
    shapes = ((matrix.weight.shape[0],), (1,))
    if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
        raise ValueError(
            f"{name}.input_scale: must be float32 {shapes[0]} or (1,), "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    if matrix.is_blocked:
        raise ValueError(
            f"{name}.input_scale: block-scaled weights take activations scaled per {GROUP} "
            f"columns, got a static scale {tuple(scale.shape)}; leave it out"
        )
    _check_device(f"{name}.input_scale", scale, like)


def _check_capability(name: str, weight: Tensor) -> None:
    capability = lacks_fp8(weight)
    if capability is not None:
        raise ValueError(
            f"{name}.weight: FP8 needs CUDA capability 8.9 or later, got {capability}; "
            "load the checkpoint with bfloat16 experts"
        )


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: must be on {like.device} like the rows, got {tensor.device}")
