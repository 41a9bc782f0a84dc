"""What the projections share: one stream of weight rows, with a few token columns riding along.

    total[f, t] = sum_s rstd_s[t] * sum_d W[f, s*D + d] * (x_s[t, d] + r_s[t, d]) * g_s[d]

The weight tile is the left operand of every product and the tokens are its columns (swap-AB): a
Hopper GPU multiplies 64 rows of the left operand at a time, which a step of 1 to 16 tokens would
leave mostly empty. The reciprocal RMS commutes with the sum, so a norm costs a sum of squares in
the K loop and one factor on the accumulator. Where the tiles of the output do not fill the GPU the
depth is split; every split writes a float32 partial, and the program that arrives last adds them
in the order of the splits. One launch, and the same bits every time.

FP8 weights (e4m3) become float16, which holds every one of their values, and the scale multiplies
the accumulator. To bfloat16 would cost one slow conversion per weight. Activations that float16
could overflow get an exact power of two per column and step of depth.

Letters: T rows, D depth of a segment, F weight rows; a segment is one of the concatenated inputs.
"""

import triton
import triton.language as tl

NO_NORM, SEGMENT_NORM, JOINT_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
OFF, ON = tl.constexpr(False), tl.constexpr(True)
ONE, TWO = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def stream_rows(
    weight_row_ptr,  # [BLOCK_F, 1], at the first column of the segment
    x_row_ptr,  # [1, BLOCK_T]
    residual_row_ptr,  # [1, BLOCK_T], read if HAS_RESIDUAL
    gain_ptr,  # [D], read if NORMED
    in_features,
    in_rows,
    first_step,
    last_step,
    D,
    HAS_RESIDUAL: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The product over some steps of a segment's depth, and the sum of squares of its columns."""
    dtype: tl.constexpr = x_row_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for step in range(first_step, last_step):
        d = step * BLOCK_D + tl.arange(0, BLOCK_D)
        in_depth = d < D
        x_mask = in_depth[:, None] & in_rows
        weight = tl.load(
            weight_row_ptr + d[None, :],
            mask=in_features & in_depth[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_row_ptr + d[:, None], mask=x_mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_row_ptr + d[:, None], mask=x_mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        if NORMED:
            x = x.to(tl.float32)
            squares += tl.sum(x * x, axis=0)
            x *= tl.load(gain_ptr + d, mask=in_depth, other=0.0).to(tl.float32)[:, None]
        total = multiply_add(weight, x, total, dtype)
    return total, squares


@triton.jit
def multiply_add(weight, x, total, dtype: tl.constexpr):
    """`total + weight @ x`; `x` is `dtype`, or float32 on its way back to `dtype`."""
    IS_FP8: tl.constexpr = weight.dtype == tl.float8e4nv
    operand: tl.constexpr = tl.float16 if IS_FP8 and dtype != tl.float32 else dtype  # pyright: ignore
    weight = weight.to(operand)
    if operand == tl.float16 and x.dtype != tl.float16:
        x = x.to(tl.float32)
        down, up = column_scales(x)
        product = tl.dot(weight, (x * down[None, :]).to(operand), input_precision="ieee")
        return total + product * up[None, :]
    return tl.dot(weight, x.to(operand), total, input_precision="ieee")


@triton.jit
def column_scales(x):
    """2^-e per column that brings its largest |x| into [2^14, 2^15), and 2^e; both are finite."""
    largest = tl.max(tl.abs(x), axis=0)
    bits = tl.cast(largest, tl.int32, bitcast=True)
    exponent = tl.maximum(bits >> 23, 15)
    down = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return down, ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def steps_of_part(part, D, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """First and last step of one of `PARTS` shares of a segment; the last shares may be empty."""
    steps = tl.cdiv(D, BLOCK_D)
    share = tl.cdiv(steps, PARTS)
    return part * share, tl.minimum((part + 1) * share, steps)


@triton.jit
def reciprocal_rms(squares, width, eps):
    return 1.0 / tl.sqrt(squares / width + eps)


@triton.jit
def gather_splits(
    total,
    squares,
    partials_ptr,  # [tiles, SEGMENTS * PARTS, BLOCK_F + 1, BLOCK_T]; the last row holds squares
    arrivals_ptr,  # [tiles], zero before and after
    D,
    eps,
    NORM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Totals of all splits in the program that arrives last; the others get zeros and False."""
    SIZE: tl.constexpr = (BLOCK_F + 1) * BLOCK_T
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tile_ptr = partials_ptr + tile.to(tl.int64) * (SEGMENTS * PARTS * SIZE)
    column = tl.arange(0, BLOCK_T)
    cell = tl.arange(0, BLOCK_F)[:, None] * BLOCK_T + column[None, :]
    own_ptr = tile_ptr + tl.program_id(2) * SIZE
    tl.store(own_ptr + cell, total)
    if NORM != NO_NORM:
        tl.store(own_ptr + BLOCK_F * BLOCK_T + column, squares)
    tl.debug_barrier()  # every thread has stored before one of them says so
    arrived = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel")
    is_last = arrived == SEGMENTS * PARTS - 1
    tl.store(arrivals_ptr + tile, 0, mask=is_last)
    total = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for segment in range(0, tl.where(is_last, SEGMENTS, 0)):
        segment_ptr = tile_ptr + segment * (PARTS * SIZE)
        segment_total = tl.zeros([BLOCK_F, BLOCK_T], tl.float32)
        segment_squares = tl.zeros([BLOCK_T], tl.float32)
        for part in range(PARTS):
            part_ptr = segment_ptr + part * SIZE
            segment_total += tl.load(part_ptr + cell, cache_modifier=".cg")
            if NORM != NO_NORM:
                square_ptr = part_ptr + BLOCK_F * BLOCK_T + column
                segment_squares += tl.load(square_ptr, cache_modifier=".cg")
        if NORM == SEGMENT_NORM:
            segment_total *= reciprocal_rms(segment_squares, D, eps)[None, :]
        total += segment_total
        squares += segment_squares
    return total, squares, is_last


@triton.jit
def scaled_and_biased(
    total, scale_ptr, bias_ptr, row, in_features, stride_sf, HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """FP8 scale and bias of weight rows `row` [BLOCK_F, 1] on the accumulator."""
    if HAS_SCALE:
        total *= tl.load(scale_ptr + row * stride_sf, mask=in_features, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=in_features, other=0.0).to(tl.float32)
    return total
