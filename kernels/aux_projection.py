"""EAGLE-3's feature fusion: concatenate the tapped hidden states of the target and project them.

    y = concat(tap_0, ..., tap_{I-1}) @ W^T + b = sum_i tap_i @ W[:, i*D:(i+1)*D]^T + b

EAGLE-3 (arXiv 2503.01840, section 3.1) fuses a low, a middle and a high layer this way. The kernel
runs one K loop over all taps into one float32 accumulator, so the [T, I*D] concatenation is never
materialised; the sum is rounded once, after the bias. The weight tile is the left operand, as in
`linear`.

Letters: T rows, I taps, D width of a tap, F output width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend, check_launchable, pick

MAX_TAPS = 8


def aux_projection_ref(
    taps: Sequence[Tensor], weight_FI: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The formula above in PyTorch, with the concatenation."""
    return F.linear(torch.cat(list(taps), dim=-1), weight_FI, bias)


@triton.jit(do_not_specialize=["T"])
def _aux_projection_kernel(
    tap0_ptr,  # [T, D], as the seven below; those from NUM_TAPS on are not read
    tap1_ptr,
    tap2_ptr,
    tap3_ptr,
    tap4_ptr,
    tap5_ptr,
    tap6_ptr,
    tap7_ptr,
    weight_ptr,  # [F, I * D]
    bias_ptr,  # [F], read if HAS_BIAS
    out_ptr,  # [T, F]
    stride_wf,
    T,
    D,
    F,
    NUM_TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None]
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    in_features, is_row = f < F, t < T
    weight_row_ptr, row = weight_ptr + f.to(tl.int64) * stride_wf, t.to(tl.int64) * D
    num_steps = tl.cdiv(D, BLOCK_D)
    total = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    for step in range(0, NUM_TAPS * num_steps):
        tap = step // num_steps
        d = step % num_steps * BLOCK_D + tl.arange(0, BLOCK_D)
        tap_ptr = tap0_ptr
        tap_ptr = tl.where(tap == 1, tap1_ptr, tap_ptr)
        tap_ptr = tl.where(tap == 2, tap2_ptr, tap_ptr)
        tap_ptr = tl.where(tap == 3, tap3_ptr, tap_ptr)
        tap_ptr = tl.where(tap == 4, tap4_ptr, tap_ptr)
        tap_ptr = tl.where(tap == 5, tap5_ptr, tap_ptr)
        tap_ptr = tl.where(tap == 6, tap6_ptr, tap_ptr)
        tap_ptr = tl.where(tap == 7, tap7_ptr, tap_ptr)
        weight_mask, x_mask = in_features & (d < D)[None, :], is_row & (d < D)[:, None]
        weight = tl.load(weight_row_ptr + tap * D + d[None, :], mask=weight_mask, other=0.0)
        x = tl.load(tap_ptr + row + d[:, None], mask=x_mask, other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + f, mask=in_features, other=0.0).to(tl.float32)
    tl.store(out_ptr + t.to(tl.int64) * F + f, total, mask=in_features & is_row)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile of the output (`BLOCK_F` x `BLOCK_T`) and depth of one step of the sum."""

    BLOCK_F: int
    BLOCK_T: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def _launch_config(rows: int, itemsize: int) -> LaunchConfig:
    """As `linear`: 64 weight rows, 16 to 64 columns, 128 bytes of depth.

    All rows ride along with one pass over the weight up to 64. Not yet measured on a GPU.
    """
    block_t = min(64, max(16, triton.next_power_of_2(rows)))
    return LaunchConfig(64, block_t, BLOCK_D=128 // itemsize, num_warps=4, num_stages=4)


@torch.library.custom_op("aerie::aux_projection", mutates_args=())
def _aux_projection_op(taps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    check_launchable(weight)
    (rows, width), columns = taps[0].shape, weight.shape[0]
    out = taps[0].new_empty((rows, columns))
    config = _launch_config(rows, weight.element_size())
    if rows == 0:
        return out
    grid = (triton.cdiv(columns, config.BLOCK_F), triton.cdiv(rows, config.BLOCK_T))
    _aux_projection_kernel[grid](
        *taps,
        *[taps[0]] * (MAX_TAPS - len(taps)),
        weight,
        weight if bias is None else bias,
        out,
        weight.stride(0),
        rows,
        width,
        columns,
        NUM_TAPS=len(taps),
        HAS_BIAS=bias is not None,
        BLOCK_F=config.BLOCK_F,
        BLOCK_T=config.BLOCK_T,
        BLOCK_D=config.BLOCK_D,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@_aux_projection_op.register_fake
def _(taps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    return taps[0].new_empty((taps[0].shape[0], weight.shape[0]))


def aux_projection(taps: Sequence[Tensor], weight_FI: Tensor, bias: Tensor | None = None) -> Tensor:
    """Projection of the concatenated `taps` (each [T, D]); `weight_FI` is [F, I*D]; returns [T, F].

    Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    if not 1 <= len(taps) <= MAX_TAPS:
        raise ValueError(f"taps: must be 1 to {MAX_TAPS} tensors, got {len(taps)}")
    first = taps[0]
    for i, tap in enumerate(taps):
        if tap.ndim != 2 or tap.shape != first.shape or tap.dtype != weight_FI.dtype:
            raise ValueError(
                f"taps[{i}]: must be [T, D] {weight_FI.dtype} as taps[0] {tuple(first.shape)}, "
                f"got {tuple(tap.shape)} {tap.dtype}"
            )
    columns = len(taps) * first.shape[1]
    if weight_FI.shape[1:] != (columns,) or weight_FI.stride(-1) != 1:
        raise ValueError(f"weight_FI: must be [F, {columns}], got {tuple(weight_FI.shape)}")
    if bias is not None and (bias.shape != weight_FI.shape[:1] or not bias.is_contiguous()):
        raise ValueError(
            f"bias: must be a contiguous [{weight_FI.shape[0]}], got {tuple(bias.shape)}"
        )
    return _aux_projection_op([tap.contiguous() for tap in taps], weight_FI, bias)


class AuxProjection(nn.Module):
    """`aux_projection` with its weight ([width_out, num_taps * width_in]) and optional bias."""

    def __init__(
        self, width_in: int, num_taps: int, width_out: int, bias: bool, backend: ResolvedBackend
    ) -> None:
        super().__init__()
        weight = torch.empty(width_out, num_taps * width_in)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width_out), requires_grad=False) if bias else None
        self._project = pick(backend, aux_projection, aux_projection_ref)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        return self._project(taps, self.weight, self.bias)
