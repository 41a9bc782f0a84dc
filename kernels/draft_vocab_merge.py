"""Second kernel of `draft_vocab`: the best k of every row from the best k of every tile.

A logit and its draft id travel as one int64 key whose order is the order of the choice (larger
logit first, then lower id), so that a choice is one maximum and all keys differ. The k best of a
row lie in the k tiles with the best heads, because each of these heads goes before anything in
another tile. So the merge reads one key per tile, picks k tiles, and reads k more keys of each:
U / 64 + k * k keys in place of U / 64 * k, in two rounds of loads.

Letters: T rows, U draft vocabulary, A the k kept.
"""

import triton
import triton.language as tl
from torch import Tensor

NO_KEY = tl.constexpr(-(2**63))  # below the key of every logit, NaN included


@triton.jit
def sort_key(logit, id):
    """The key of a float32 logit and an id from 0 to 2^31 - 1."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 ties with 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)


@triton.jit
def key_logit(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_id(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _largest(keys, a, A: tl.constexpr):
    """The `A` largest of the 1-D `keys`, falling, in the first lanes of `a`; NO_KEY in the rest."""
    found = tl.where(a < 0, tl.max(keys, axis=0), NO_KEY)
    for i in range(0, A):
        best = tl.max(keys, axis=0)
        found = tl.where(a == i, best, found)
        keys = tl.where(keys == best, NO_KEY, keys)
    return found


@triton.jit
def _draft_vocab_merge_kernel(
    keys_ptr,  # [T, A, tiles]
    sums_ptr,  # [T, tiles], of exp(logit - maximum of the tile)
    d2t_ptr,  # [U], read if HAS_MAP
    ids_ptr,  # [T, A]
    logprobs_ptr,  # [T, A]
    logsumexp_ptr,  # [T]
    num_tiles,
    A: tl.constexpr,
    HAS_MAP: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    is_tile = n < num_tiles
    heads = tl.load(keys_ptr + t * A * num_tiles + n, mask=is_tile, other=NO_KEY)
    sums = tl.load(sums_ptr + t * num_tiles + n, mask=is_tile, other=0.0)
    maxima = tl.where(is_tile, key_logit(heads), -float("inf"))
    maximum = tl.max(maxima, axis=0)
    # a row of nothing but -inf: -inf - -inf would be NaN
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    log_total = tl.log(tl.sum(sums * tl.exp(maxima - shift), axis=0))
    tl.store(logsumexp_ptr + t, log_total + shift)

    a = tl.arange(0, BLOCK_A)
    chosen = _largest(heads, a, A)
    tile = key_id(chosen) // BLOCK_U
    is_candidate = (chosen != NO_KEY)[:, None] & (a < A)[None, :]
    candidate_ptr = keys_ptr + (t * A + a[None, :]) * num_tiles + tile[:, None]
    candidates = tl.load(candidate_ptr, mask=is_candidate, other=NO_KEY)
    kept = _largest(tl.reshape(candidates, [BLOCK_A * BLOCK_A]), a, A)
    u = key_id(kept).to(tl.int64)
    offset = tl.load(d2t_ptr + u, mask=a < A, other=0) if HAS_MAP else 0
    tl.store(ids_ptr + t * A + a, u + offset, mask=a < A)
    # not from the stored sum: a sure token's tiny logprob would be a difference of large numbers
    tl.store(logprobs_ptr + t * A + a, key_logit(kept) - shift - log_total, mask=a < A)


def merge_tiles(
    keys: Tensor,
    sums: Tensor,
    d2t: Tensor | None,
    block_u: int,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills ids, log-probabilities and logsumexp: one program per row, its tiles in one pass.

    A thread holds at most 8 tiles up to a vocabulary of 262144. Not yet measured on a GPU.
    """
    rows, k, num_tiles = keys.shape
    lanes = triton.next_power_of_2(num_tiles)
    _draft_vocab_merge_kernel[(rows,)](
        keys,
        sums,
        keys if d2t is None else d2t,
        *outputs,
        num_tiles,
        A=k,
        HAS_MAP=d2t is not None,
        BLOCK_U=block_u,
        BLOCK_N=lanes,
        BLOCK_A=triton.next_power_of_2(k),
        num_warps=min(16, max(4, lanes // 256)),
    )
    return outputs
