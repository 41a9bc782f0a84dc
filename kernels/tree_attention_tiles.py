"""What a program of `tree_attention` does with the keys of its share, tile by tile.

In most tiles every row sees every key: these need no mask. The edges do: where a tile holds keys
below the chunk of some row, the end of the prefix, and the new rows, which alone look at ancestor
words.

In the edges a weight of zero is not enough to hide a value, as 0 * NaN is NaN. A NaN or an infinity
is therefore taken out of the product, and added afterwards to the rows that see it, one key at a
time: exact, and no work as long as all values are finite.

Letters: as in `tree_attention`; a tile is `BLOCK_N` logical slots, and `state` is the accumulator,
maximum and total of the online softmax, base 2.
"""

import triton
import triton.language as tl

PLAIN = tl.constexpr("")  # no policy for the cache


@triton.jit
def fitted(q, factor):
    """Rows as they meet FP8 keys, which become float16, and the factor of their scores.

    A bfloat16 row is turned into float16 times an exact 2^-e that rules out overflow.
    """
    if q.dtype == tl.bfloat16:
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), axis=1), 0.0)
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
        down = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        up = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        q, factor = (wide * down[:, None]).to(tl.float16), factor * up
    return q, factor


@triton.jit
def _pages(pages_ptr, start, last, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Pages of the keys of the tile at logical slot `start`; one page, where it holds them all.

    Only entries of slots before `last` are looked up.
    """
    # tiles start at multiples of BLOCK_N, and both sizes are powers of two
    slot = start if BLOCK_N <= PAGE_SIZE else start + tl.arange(0, BLOCK_N)
    return tl.load(pages_ptr + slot // PAGE_SIZE, mask=slot < last, other=0)


@triton.jit
def _offsets(page, start, stride_slot, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    inside = start % PAGE_SIZE + n if BLOCK_N <= PAGE_SIZE else (start + n) % PAGE_SIZE
    return (page.to(tl.int64) * PAGE_SIZE + inside) * stride_slot


@triton.jit
def _loaded(at, mask, IS_MASKED: tl.constexpr, KV_POLICY: tl.constexpr):
    if IS_MASKED:
        return tl.load(at, mask, 0.0, eviction_policy=KV_POLICY)  # pyright: ignore[reportArgumentType]
    return tl.load(at, eviction_policy=KV_POLICY)  # pyright: ignore[reportArgumentType]


@triton.jit
def _scores(
    query, key_ptr, read, K: tl.constexpr, KV_POLICY: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_M, BLOCK_N] of the keys at `key_ptr` [BLOCK_N, 1]; `read` None: of all."""
    q, factor, row_ptr, is_row = query
    IS_MASKED: tl.constexpr = read is not None or BLOCK_K != K  # pyright: ignore
    if q.dtype == tl.float32:
        # without tensor cores a product holds both operands in registers: half a row at a time
        SLICE: tl.constexpr = max(16, BLOCK_K // 2)  # pyright: ignore
        scores = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        for start in tl.range(0, BLOCK_K, SLICE, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
            k = start + tl.arange(0, SLICE)[None, :]
            in_head = k < K if read is None else read[:, None] & (k < K)
            key = _loaded(key_ptr + k, in_head, IS_MASKED, KV_POLICY)
            part = tl.load(row_ptr + k, mask=is_row & (k < K), other=0.0)
            scores = tl.dot(part, tl.trans(key.to(tl.float32)), scores, input_precision="ieee")
    else:
        k = tl.arange(0, BLOCK_K)[None, :]
        in_head = k < K if read is None else read[:, None] & (k < K)
        key = _loaded(key_ptr + k, in_head, IS_MASKED, KV_POLICY)
        scores = tl.dot(q, tl.trans(key.to(q.dtype)), input_precision="ieee")
    return scores * factor[:, None]


@triton.jit
def _softmax_step(scores, visible, state):
    """Weights of the keys of one tile, and the state after it, less the product with the values."""
    accumulator, maximum, total = state
    if visible is not None:
        scores = tl.where(visible, scores, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # a row that has seen no key yet: -inf - -inf would be NaN
    shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(maximum - shift)
    total = total * decay + tl.sum(weights, axis=1)
    return weights, (accumulator * decay[:, None], new_maximum, total)


@triton.jit
def attend_full(
    query, state, k_ptr, v_ptr, pages_ptr, first, last, stride_slot,
    K: tl.constexpr, PAGE_SIZE: tl.constexpr, KV_POLICY: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Whole tiles that every row sees, from slot `first` to slot `last`.

    A tile's pages are looked up one tile ahead, so that its keys wait for one load and not for two.
    """
    dtype = query[0].dtype
    k = tl.arange(0, BLOCK_K)[None, :]
    page = _pages(pages_ptr, first, last, PAGE_SIZE, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        offset = _offsets(page, start, stride_slot, PAGE_SIZE, BLOCK_N)[:, None]
        page = _pages(pages_ptr, start + BLOCK_N, last, PAGE_SIZE, BLOCK_N)
        scores = _scores(query, k_ptr + offset, None, K, KV_POLICY, BLOCK_N, BLOCK_K)
        value = _loaded(v_ptr + offset + k, k < K, BLOCK_K != K, KV_POLICY).to(dtype)
        weights, state = _softmax_step(scores, None, state)
        product = tl.dot(weights.to(dtype), value, state[0], input_precision="ieee")
        state = (product, state[1], state[2])
    return state


@triton.jit
def words_in_chunk(word, lowest, position_ptr, num_rows):
    """Ancestor words without the new rows whose position is below the bound of the row."""
    j = tl.arange(0, 64)
    position = tl.load(position_ptr + j, mask=j < num_rows, other=0).to(tl.int32)
    bits = tl.full([1, 64], 1, tl.int64) << j[None, :]
    return word & tl.sum(tl.where(position[None, :] >= lowest[:, None], bits, 0), axis=1)


@triton.jit
def _visible(word, t, lowest, prefix, start, HAS_ANCESTORS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which rows [BLOCK_M] see which keys of the tile at slot `start`, should they exist."""
    n = tl.arange(0, BLOCK_N)[None, :]
    visible = n >= (lowest - start)[:, None]
    if not HAS_ANCESTORS:
        return visible & (n <= (prefix + t - start)[:, None])
    # bit n of a row is whether it sees slot start + n; in two halves, as wide shifts take room
    before = tl.minimum(tl.maximum(prefix - start, 0), 63).to(tl.int64)
    behind = tl.maximum(start - prefix, 0).to(tl.int64)
    bits = tl.where(prefix - start > 63, -1, ((word >> behind) << before) | ((1 << before) - 1))
    half = tl.where(n < 32, bits.to(tl.int32)[:, None], (bits >> 32).to(tl.int32)[:, None])
    return visible & (((half >> (n % 32)) & 1) == 1)


@triton.jit
def attend_edges(
    query, state, k_ptr, v_ptr, pages_ptr, word, t, lowest, prefix, first, last, begin, end,
    full_from, full_length, stride_slot,
    K: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_ANCESTORS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tiles from `begin` to `end` around the full ones, key by key as every row sees them.

    Reads slots `first` to `last` only. Values that are not finite are left out; also returns
    whether there were any.
    """
    dtype = query[0].dtype
    k = tl.arange(0, BLOCK_K)[None, :]
    spoilt = tl.zeros([BLOCK_N], tl.int32)
    for near in tl.range(begin, end - full_length, BLOCK_N, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        start = near + tl.where(near >= full_from, full_length, 0)
        slot = start + tl.arange(0, BLOCK_N)
        read = (slot >= first) & (slot < last)
        page = _pages(pages_ptr, start, last, PAGE_SIZE, BLOCK_N)
        offset = _offsets(page, start, stride_slot, PAGE_SIZE, BLOCK_N)[:, None]
        scores = _scores(query, k_ptr + offset, read, K, PLAIN, BLOCK_N, BLOCK_K)
        value = tl.load(v_ptr + offset + k, mask=read[:, None] & (k < K), other=0.0).to(dtype)
        visible = _visible(word, t, lowest, prefix, start, HAS_ANCESTORS, BLOCK_N)
        weights, state = _softmax_step(scores, visible & read[None, :], state)
        is_finite = tl.abs(value.to(tl.float32)) < float("inf")
        spoilt += tl.max((is_finite == 0).to(tl.int32), axis=1)
        value = tl.where(is_finite, value, 0.0).to(dtype)
        product = tl.dot(weights.to(dtype), value, state[0], input_precision="ieee")
        state = (product, state[1], state[2])
    return state, tl.maximum(tl.max(spoilt, axis=0), 0) > 0


@triton.jit
def add_spoilt(
    query, accumulator, maximum, k_ptr, v_ptr, pages_ptr, word, t, lowest, prefix, first, last,
    begin, end, full_from, full_length, stride_slot,
    K: tl.constexpr, PAGE_SIZE: tl.constexpr, HAS_ANCESTORS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds what `attend_edges` left out: each value to the rows that see it, one key at a time."""
    n, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    for near in tl.range(begin, end - full_length, BLOCK_N, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        start = near + tl.where(near >= full_from, full_length, 0)
        read = (start + n >= first) & (start + n < last)
        page = _pages(pages_ptr, start, last, PAGE_SIZE, BLOCK_N)
        row_offset = _offsets(page, start, stride_slot, PAGE_SIZE, BLOCK_N)
        scores = _scores(query, k_ptr + row_offset[:, None], read, K, PLAIN, BLOCK_N, BLOCK_K)
        weights = tl.exp2(scores - shift[:, None])
        visible = _visible(word, t, lowest, prefix, start, HAS_ANCESTORS, BLOCK_N) & read[None, :]
        for i in range(tl.minimum(BLOCK_N, last - start)):  # a number that no compiler unrolls
            here = (n == i)[None, :]
            weight = tl.sum(tl.where(here, weights, 0.0), axis=1, keep_dims=True)
            sees = tl.maximum(tl.max(tl.where(here & visible, 1, 0), axis=1, keep_dims=True), 0)
            offset = tl.sum(tl.where(n == i, row_offset, 0), axis=0)
            value = tl.load(v_ptr + offset + k, mask=k < K, other=0.0).to(tl.float32)
            spoilt = tl.where(tl.abs(value) < float("inf"), 0.0, value)
            accumulator += tl.where(sees > 0, spoilt[None, :] * weight, 0.0)
    return accumulator
