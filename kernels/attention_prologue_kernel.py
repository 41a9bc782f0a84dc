"""The kernel of `attention_prologue`: each program does some heads of queries, keys and values.

A head of a value passes through; a head of a query or key is rotated and normed in float32, rounded
to the model dtype after each step.

Letters: as in `attention_prologue`.
"""

import triton
import triton.language as tl


@triton.jit
def _cached(x, scale_ptr, g, stride_scale, written, HAS_SCALES: tl.constexpr):
    """What a cache keeps of float32 `x`; the limit passes NaN on."""
    if HAS_SCALES:
        scale = tl.load(scale_ptr + g * stride_scale, mask=written, other=1.0)[:, None, None]
        x = tl.div_rn(x, scale + tl.zeros_like(x))
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return x


@triton.jit(do_not_specialize=["T"])
def _attention_prologue_kernel(
    qkv_ptr,  # [T, H + 2 G, K]
    cos_ptr,  # [T, J], read if ROTATE
    sin_ptr,  # [T, J], read if ROTATE
    positions_ptr,  # [T], read if HAS_TEMPERATURE
    slots_ptr,  # [T]
    k_scale_ptr,  # [G] or [1], read if HAS_SCALES
    v_scale_ptr,  # [G] or [1], read if HAS_SCALES
    q_ptr,  # [T, H, K]
    k_cache_ptr,  # [R, C, G, K]
    v_cache_ptr,  # [R, C, G, K]
    stride_xt,
    stride_ks,
    stride_vs,
    T,
    H,
    G,
    J,
    eps,
    floor_scale,
    attn_scale,
    ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    t, h = head // (H + 2 * G), head % (H + 2 * G)
    j, part = tl.arange(0, BLOCK_J), tl.arange(0, 2)
    in_heads = head < T.to(tl.int64) * (H + 2 * G)
    in_angles = in_heads[:, None] & (j < J)[None, :]
    in_tile = in_angles[:, :, None] & (part < 2)[None, None, :]
    if INTERLEAVED:
        offset = (j[:, None] * 2 + part[None, :])[None, :, :]
    else:
        offset = (j[:, None] + part[None, :] * J)[None, :, :]
    x = tl.load(qkv_ptr + (t * stride_xt + h * 2 * J)[:, None, None] + offset, in_tile, 0.0)
    dtype: tl.constexpr = x.dtype
    x = x.to(tl.float32)
    if ROTATE:
        is_turned = h < H + G
        angle = t[:, None] * J + j[None, :]
        cos = tl.load(cos_ptr + angle, mask=in_angles & is_turned[:, None], other=1.0)
        sin = tl.load(sin_ptr + angle, mask=in_angles & is_turned[:, None], other=0.0)
        a, b = tl.split(x)  # [BLOCK_HEADS, BLOCK_J] each
        turned = tl.join(a * cos - b * sin, b * cos + a * sin).to(dtype).to(tl.float32)
        if NORM:
            mean_square = tl.sum(tl.sum(turned * turned, axis=2), axis=1) / (2 * J)
            turned = turned / tl.sqrt(mean_square + eps)[:, None, None]
        x = tl.where(is_turned[:, None, None], turned.to(dtype).to(tl.float32), x)
    if HAS_TEMPERATURE:
        position = tl.load(positions_ptr + t, mask=in_heads, other=0).to(tl.float32)
        # `/` is approximate on a GPU, and could fall short of a step at its very first position
        step = tl.floor(tl.div_rn(position + 1.0, floor_scale + tl.zeros_like(position)))
        warmth = tl.log(1.0 + step) * attn_scale + 1.0
        x = tl.where(
            (h < H)[:, None, None], (x * warmth[:, None, None]).to(dtype).to(tl.float32), x
        )
    is_q = in_heads & (h < H)
    q_offset = ((t * H + h) * 2 * J)[:, None, None] + offset
    tl.store(q_ptr + q_offset, x, mask=in_tile & is_q[:, None, None])

    slot = tl.load(slots_ptr + t, mask=in_heads & (h >= H), other=-1)
    is_k, is_v = (slot >= 0) & (h < H + G), (slot >= 0) & (h >= H + G)
    g = tl.where(h < H + G, h - H, h - H - G)
    cell = ((slot * G + g) * 2 * J)[:, None, None] + offset
    key = _cached(x, k_scale_ptr, g, stride_ks, is_k, HAS_SCALES)
    tl.store(k_cache_ptr + cell, key, mask=in_tile & is_k[:, None, None])
    value = _cached(x, v_scale_ptr, g, stride_vs, is_v, HAS_SCALES)
    tl.store(v_cache_ptr + cell, value, mask=in_tile & is_v[:, None, None])
