"""Linear layer for few rows: the weights are read once, the rows ride along.

    y = x W^T + b

The K loop, FP8 weights and the split of the depth are those of `weight_stream`. Accumulation, FP8
scale and bias are float32; the result is rounded once.

Letters: T rows, D input width, F output width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend, check_launchable, pick
from aerie.kernels.module import Module
from aerie.kernels.quantize import Codes, Quantized, quantize, quantize_ref
from aerie.kernels.scaled_linear import scaled_linear, scaled_linear_ref
from aerie.kernels.stream_launch import (
    FP8,
    LaunchConfig,
    check_rows,
    check_vector,
    check_weight,
    projected,
    scale_mode,
    scale_stride,
    split_scratch,
    stream_config,
    streamed,
)
from aerie.kernels.target import Target, target_of
from aerie.kernels.weight_stream import (
    NO_NORM,
    OFF,
    ONE,
    block_row_ptr,
    gather_splits,
    scaled_and_biased,
    steps_of_part,
    stream_rows,
)


def linear_ref(
    x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, scale_F: Tensor | None = None
) -> Tensor:
    """The formula above in PyTorch."""
    return projected(x_TD, weight_FD, bias_F, scale_F)


@triton.jit(do_not_specialize=["T"])
def _linear_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [F, D]
    scale_ptr,  # [F], [1] or [F / 128, columns / 128], read if SCALE
    bias_ptr,  # [F], read if HAS_BIAS
    y_ptr,  # [T, F]
    partials_ptr,  # as in `gather_splits`
    arrivals_ptr,  # [tiles]
    stride_xt,
    stride_wf,
    stride_sf,
    T,
    D,
    F,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :].to(tl.int64)
    f = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    in_features, in_rows = f < F, t < T
    x_row_ptr = x_ptr + t * stride_xt
    weight_row_ptr = weight_ptr + f.to(tl.int64) * stride_wf
    first, last = steps_of_part(tl.program_id(2), D, PARTS, BLOCK_D)
    total, squares = tl.zeros([BLOCK_F, BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    total, squares = stream_rows(
        total, squares, weight_row_ptr, block_row_ptr(scale_ptr, f, stride_sf), x_row_ptr,
        x_row_ptr, x_ptr, in_features, in_rows, first, last, D,
        OFF, OFF, SCALE, BLOCK_F, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    if PARTS > 1:
        total, squares, is_last = gather_splits(
            total,
            squares,
            partials_ptr,
            arrivals_ptr,
            D,
            0.0,
            NO_NORM,
            ONE,
            PARTS,
            BLOCK_F,
            BLOCK_T,
        )
        in_rows = t < tl.where(is_last, T, 0)
    total = scaled_and_biased(
        total, scale_ptr, bias_ptr, f, in_features, stride_sf, SCALE, HAS_BIAS
    )
    tl.store(y_ptr + t * F + f, total, mask=in_features & in_rows)


def _launch_config(
    target: Target, rows: int, features: int, depth: int, itemsize: int, weight_itemsize: int
) -> LaunchConfig:
    """The shared rule: a width of 5120 splits its depth in three, 32000 not. Not yet measured."""
    return stream_config(target, rows, features, depth, 1, itemsize, weight_itemsize)


@torch.library.custom_op("aerie::linear", mutates_args=())
def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    check_launchable(x)
    (rows, depth), features = x.shape, weight.shape[0]
    y_TF = x.new_empty(rows, features)
    config = _launch_config(target_of(x), rows, features, depth, x.itemsize, weight.itemsize)
    weight = streamed(weight, depth)
    grid = (triton.cdiv(rows, config.BLOCK_T), triton.cdiv(features, config.BLOCK_F), config.PARTS)
    if y_TF.numel() > 0:
        partials, arrivals = split_scratch(x, config, grid)
        _linear_kernel[grid](
            x,
            weight,
            weight if scale is None else scale,
            weight if bias is None else bias,
            y_TF,
            partials,
            arrivals,
            x.stride(0),
            weight.stride(0),
            scale_stride(scale),
            rows,
            depth,
            features,
            SCALE=scale_mode(scale),
            HAS_BIAS=bias is not None,
            PARTS=config.PARTS,
            BLOCK_F=config.BLOCK_F,
            BLOCK_T=config.BLOCK_T,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y_TF


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def linear(
    x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None, scale_F: Tensor | None = None
) -> Tensor:
    """`x_TD @ weight_FD^T + bias_F`; returns [T, F] in the dtype of `x_TD`.

    An FP8 weight (float8_e4m3fn) comes with `scale_F`, float32 [F], [1] or, for blocks
    of 128 x 128, [ceil(F / 128), ceil(D / 128)]. Raises ValueError on a shape, dtype, device or
    layout the kernel would read wrongly.
    """
    check_rows("x_TD", x_TD)
    check_weight("weight_FD", weight_FD, x_TD.shape[1], x_TD, scale_F, "scale_F")
    check_vector("bias_F", bias_F, weight_FD.shape[0], x_TD)
    return _linear_op(x_TD, weight_FD, bias_F, scale_F)


class Linear(Module):
    """Linear layer, parameters named as in Hugging Face checkpoints (`weight`, `bias`).

    An FP8 weight has a `weight_scale` (see `linear`). It meets rows as they are, which is more
    exact than the W8A8 arithmetic that FP8 checkpoints are written for, or, in prompts, as codes
    (`quantises_rows`): with a scale per row, or per 128 columns where the weight has blocks. Static
    scales of activations are not used; one of the row's own fits it better.
    """

    bias: nn.Parameter | None
    weight_scale: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, backend: ResolvedBackend
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        vector = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", vector)
        self.register_parameter("weight_scale", None)
        self._linear = pick(backend, linear, linear_ref)
        self._quantize = pick(backend, quantize, quantize_ref)
        self._scaled_linear = pick(backend, scaled_linear, scaled_linear_ref)

    def hold_fp8(self, scale_shape: tuple[int, ...]) -> None:
        """Makes the weight FP8 with a scale of that shape; both have no values yet."""
        codes = torch.empty_like(self.weight, dtype=FP8)
        scale = torch.empty(scale_shape, dtype=torch.float32, device=codes.device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @property
    def row_codes(self) -> Codes:
        """How rows are quantised that meet the weight as codes."""
        scale = self._parameters["weight_scale"]
        return "none" if scale is None else "row" if scale.ndim == 1 else "group"

    def forward(self, x_TD: Tensor, quantises: bool = False) -> Tensor:
        """`quantises`: rows meet an FP8 weight as codes. An unquantised one never meets codes."""
        own = self._parameters
        if quantises and own["weight_scale"] is not None:
            return self.of_codes(self._quantize(x_TD, self.row_codes == "group"), x_TD.dtype)
        return self._linear(x_TD, own["weight"], own["bias"], own["weight_scale"])

    def of_codes(self, rows: Quantized, dtype: torch.dtype) -> Tensor:
        """The product with rows that are codes, as `row_codes` says; a result of `dtype`."""
        own = self._parameters
        return self._scaled_linear(rows, own["weight"], own["weight_scale"], own["bias"], dtype)
