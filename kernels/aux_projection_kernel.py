"""The kernel of `aux_projection`, which is its only caller; eight taps take many arguments."""

import triton
import triton.language as tl

from aerie.kernels.weight_stream import (
    JOINT_NORM,
    NO_NORM,
    SCALE_BLOCK,
    SEGMENT_NORM,
    block_row_ptr,
    gather_splits,
    reciprocal_rms,
    scaled_and_biased,
    steps_of_part,
    stored_columns,
    stream_rows,
)

MAX_TAPS = 8


@triton.jit
def _of_eight(i, p0, p1, p2, p3, p4, p5, p6, p7):
    """The `i`-th of eight pointers."""
    low = tl.where(i < 2, tl.where(i == 0, p0, p1), tl.where(i == 2, p2, p3))
    high = tl.where(i < 6, tl.where(i == 4, p4, p5), tl.where(i == 6, p6, p7))
    return tl.where(i < 4, low, high)


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
    residual0_ptr,  # [T, D], as the seven below; read if HAS_RESIDUAL
    residual1_ptr,
    residual2_ptr,
    residual3_ptr,
    residual4_ptr,
    residual5_ptr,
    residual6_ptr,
    residual7_ptr,
    gain0_ptr,  # [D], as the seven below; read if NORM
    gain1_ptr,
    gain2_ptr,
    gain3_ptr,
    gain4_ptr,
    gain5_ptr,
    gain6_ptr,
    gain7_ptr,
    weight_ptr,  # [F, I * D]
    scale_ptr,  # [F], [1] or [F / 128, I * D / 128], read if SCALE
    bias_ptr,  # [F], read if HAS_BIAS
    out_ptr,  # [T, F]
    partials_ptr,  # as in `gather_splits`
    arrivals_ptr,  # [tiles]
    stride_xt,
    stride_rt,
    stride_wf,
    stride_sf,
    T,
    D,
    F,
    eps,
    NUM_TAPS: tl.constexpr,
    NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :].to(tl.int64)
    f = (tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F))[:, None]
    in_features, in_rows = f < F, t < T
    weight_row_ptr = weight_ptr + f.to(tl.int64) * stride_wf
    first_tap = tl.program_id(2) // PARTS
    last_tap = first_tap + 1 if SPLIT else NUM_TAPS
    first, last = steps_of_part(tl.program_id(2) % PARTS, D, PARTS, BLOCK_D)
    total = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    scale_row_ptr = block_row_ptr(scale_ptr, f, stride_sf)
    columns = stored_columns(weight_ptr, D)
    for tap in range(first_tap, last_tap):
        x_ptr = _of_eight(
            tap, tap0_ptr, tap1_ptr, tap2_ptr, tap3_ptr, tap4_ptr, tap5_ptr, tap6_ptr, tap7_ptr
        )
        residual_ptr = _of_eight(
            tap, residual0_ptr, residual1_ptr, residual2_ptr, residual3_ptr,
            residual4_ptr, residual5_ptr, residual6_ptr, residual7_ptr,
        )  # fmt: skip
        gain_ptr = _of_eight(
            tap, gain0_ptr, gain1_ptr, gain2_ptr, gain3_ptr,
            gain4_ptr, gain5_ptr, gain6_ptr, gain7_ptr,
        )  # fmt: skip
        # the RMS of a tap multiplies its own sum; without one, one sum is enough
        own_sum: tl.constexpr = NORM == SEGMENT_NORM and not SPLIT
        tap_total = tl.zeros_like(total) if own_sum else total
        tap_squares = tl.zeros_like(squares) if own_sum else squares
        tap_total, tap_squares = stream_rows(
            tap_total, tap_squares, weight_row_ptr + tap * columns,
            scale_row_ptr + tap * (D // SCALE_BLOCK), x_ptr + t * stride_xt,
            residual_ptr + t * stride_rt, gain_ptr, in_features, in_rows, first, last, D,
            HAS_RESIDUAL, NORM != NO_NORM, SCALE,
            BLOCK_F, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        if own_sum:
            total += tap_total * reciprocal_rms(tap_squares, D, eps)[None, :]
        else:
            total, squares = tap_total, tap_squares
    if SPLIT:
        total, squares, is_last = gather_splits(
            total, squares, partials_ptr, arrivals_ptr, D, eps, NORM, NUM_TAPS, PARTS,
            BLOCK_F, BLOCK_T,
        )  # fmt: skip
        in_rows = t < tl.where(is_last, T, 0)
    if NORM == JOINT_NORM:
        total *= reciprocal_rms(squares, NUM_TAPS * D, eps)[None, :]
    total = scaled_and_biased(
        total, scale_ptr, bias_ptr, f, in_features, stride_sf, SCALE, HAS_BIAS
    )
    tl.store(out_ptr + t * F + f, total, mask=in_features & in_rows)
