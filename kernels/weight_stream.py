"""What the projections share: one stream of weight rows, with a few token columns riding along.

    total[f, t] = sum_s rstd_s[t] * sum_d W[f, s*D + d] * (x_s[t, d] + r_s[t, d]) * g_s[d]

The weight tile is the left operand of every product and the tokens are its columns (swap-AB): a
Hopper GPU multiplies 64 rows of the left operand at a time, which a step of 1 to 16 tokens would
leave mostly empty. The reciprocal RMS commutes with the sum, so a norm costs a sum of squares in
the K loop and one factor on the accumulator. Where the tiles of the output do not fill the GPU the
depth is split; every split writes a float32 partial, and the program that arrives last adds them
in the order of the splits. One launch, and the same bits every time.

FP8 weights (e4m3) become float16, which holds every one of their values; to bfloat16 would cost one
slow conversion per weight. A scale per row or for all multiplies the accumulator, one per block of
128 x 128 the product of a step, which never leaves its block. Activations that float16 could
overflow get an exact power of two per column and step of depth. The left operand of a Hopper
product is widened in registers, where it takes 8 elements of a row at a time, so a tile of bytes
would be copied 8 bytes at a time: FP8 weights are read as int16, two to an element, 16 bytes at a
time, and a step is two products, of the even and of the odd columns.

Letters: T rows, D depth of a segment, F weight rows; a segment is one of the concatenated inputs.
"""

import triton
import triton.language as tl

NO_NORM, SEGMENT_NORM, JOINT_NORM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
OFF, ON = tl.constexpr(False), tl.constexpr(True)
ONE, TWO = tl.constexpr(1), tl.constexpr(2)
NO_SCALE, ROW_SCALE, BLOCK_SCALE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SCALE_BLOCK = tl.constexpr(128)


@triton.jit
def stream_rows(
    total,
    squares,
    weight_row_ptr,  # [BLOCK_F, 1], at the first column of the segment; int16 holds two FP8
    scale_row_ptr,  # [BLOCK_F, 1], at the first block of the segment, read if SCALE is BLOCK_SCALE
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
    SCALE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`total` plus the product over some steps of a segment's depth, and `squares` plus the sum of
    squares of its columns."""
    dtype: tl.constexpr = x_row_ptr.dtype.element_ty
    PACKED: tl.constexpr = 2 if weight_row_ptr.dtype.element_ty == tl.int16 else 1
    COLUMNS: tl.constexpr = BLOCK_D // PACKED  # pyright: ignore
    for step in range(first_step, last_step):
        d = step * BLOCK_D + tl.arange(0, BLOCK_D)
        column = step * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        in_depth = d < D
        x_mask = in_depth[:, None] & in_rows
        weight = tl.load(
            weight_row_ptr + column,
            mask=in_features & (column < D // PACKED),
            other=0.0,
            eviction_policy="evict_first",
        )
        scale = 1.0
        if SCALE == BLOCK_SCALE:
            block = step * BLOCK_D // SCALE_BLOCK
            scale = tl.load(scale_row_ptr + block, mask=in_features, other=0.0)
        x = tl.load(x_row_ptr + d[:, None], mask=x_mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_row_ptr + d[:, None], mask=x_mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        if NORMED:
            x = x.to(tl.float32)
            squares += tl.sum(x * x, axis=0)
            x *= tl.load(gain_ptr + d, mask=in_depth, other=0.0).to(tl.float32)[:, None]
        total = multiply_add(weight, x, total, scale, dtype, SCALE == BLOCK_SCALE)
    return total, squares


@triton.jit
def multiply_add(weight, x, total, scale, dtype: tl.constexpr, IS_SCALED: tl.constexpr):
    """`total + scale * (weight @ x)`; `x` is `dtype`, or float32 on its way back to `dtype`."""
    IS_FP8: tl.constexpr = weight.dtype == tl.float8e4nv or weight.dtype == tl.int16
    operand: tl.constexpr = tl.float16 if IS_FP8 and dtype != tl.float32 else dtype  # pyright: ignore
    if operand == tl.float16 and x.dtype != tl.float16:
        x = x.to(tl.float32)
        down, up = column_scales(x)
        product = _product(weight, (x * down[None, :]).to(operand), tl.zeros_like(total))
        total += product * (up[None, :] * scale)
    elif IS_SCALED:
        total += _product(weight, x.to(operand), tl.zeros_like(total)) * scale
    else:
        total = _product(weight, x.to(operand), total)
    return total


@triton.jit
def _product(weight, x, total):
    """`total + weight @ x` in the dtype of `x`."""
    if weight.dtype == tl.int16:  # the earlier of two FP8 columns is the low byte
        HALF: tl.constexpr = x.shape[0] // 2
        pairs = tl.reshape(x, [HALF, 2, x.shape[1]])
        even, odd = tl.split(tl.permute(pairs, (0, 2, 1)))
        low = weight.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(x.dtype)
        high = (weight >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(x.dtype)
        total = tl.dot(low, even, total, input_precision="ieee")
        total = tl.dot(high, odd, total, input_precision="ieee")
    else:
        total = tl.dot(weight.to(x.dtype), x, total, input_precision="ieee")
    return total


@triton.jit
def stored_columns(weight_ptr, D):
    """Elements in which a row of `weight_ptr` holds `D` weights, int64 as an offset must be."""
    PACKED: tl.constexpr = 2 if weight_ptr.dtype.element_ty == tl.int16 else 1
    return tl.cast(D, tl.int64) // PACKED


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
def block_row_ptr(scale_ptr, row, stride_sf):
    """Where the block scales of weight rows `row` begin."""
    return scale_ptr + (row // SCALE_BLOCK).to(tl.int64) * stride_sf


@triton.jit
def scaled_and_biased(
    total, scale_ptr, bias_ptr, row, in_features, stride_sf, SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """FP8 scale and bias of weight rows `row` [BLOCK_F, 1] on the accumulator."""
    if SCALE == ROW_SCALE:
        total *= tl.load(scale_ptr + row.to(tl.int64) * stride_sf, mask=in_features, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=in_features, other=0.0).to(tl.float32)
    return total
