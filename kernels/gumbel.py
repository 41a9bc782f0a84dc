"""Noise that depends on a seed, a position and a token id alone, the same bits everywhere.

    gumbel[t, v] = -log(-log(u)),   u = 1 - (word + 1/2) / 2^32
    word = word (v / 1024) mod 4 of Philox4x32-10 with the key seed[t] and the counter
           (v / 4096 * 1024 + v mod 1024, position[t], 0, 0)

Philox is the counter-based generator of Salmon et al. 2011 (Random123): no state, so a position's
noise is the same whichever pass, batch, tree or device asks for it. The logarithm is Cephes' `logf`
in additions and multiplications that all round alike: launches that use it must forbid fused ones
(`enable_fp_fusion=False`). So eager and kernel agree to the last bit, and so does a choice made by
it. Resolution: an id whose probability is far below 2^-32 comes out too seldom or too often by up
to 2^-32.

Letters: T rows, V target vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 1024  # counters of a block of ids
BLOCK = tl.constexpr(4 * LANES)  # a counter gives four words, one for each quarter of a block
QUARTER = tl.constexpr(LANES)

_LOG_TERMS = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
ROOT_HALF_BITS, ONE_BITS = 0x3F3504F3, 0x3F800000
WORD_UNIT = 2.0**-32
NEAR_ONE = 2**30  # words below it give a u in (3/4, 1), whose logarithm needs u - 1 and not u
UINT32 = 0xFFFFFFFF


def philox_ref(counter_words: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10: four words (int64, 0 .. 2^32 - 1) of four counter words and 64-bit seeds."""
    c0, c1, c2, c3 = counter_words
    key0, key1 = seed & UINT32, (seed >> 32) & UINT32
    for _ in range(10):
        high0, low0 = _multiplied(c0, 0xD2511F53)
        high1, low1 = _multiplied(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & UINT32, (key1 + 0xBB67AE85) & UINT32
    return [c0, c1, c2, c3]


def _multiplied(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words, in halves that 63 bits hold."""
    upper, lower = x * (factor >> 16), x * (factor & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & UINT32


def gumbel_ref(seeds_T: Tensor, positions_T: Tensor, vocabulary: int, first: int = 0) -> Tensor:
    """The noise of `vocabulary` ids from `first` on, [T, V] float32."""
    if first % BLOCK.value:  # a block is made as a whole
        whole = first // BLOCK.value * BLOCK.value
        more = first - whole
        return gumbel_ref(seeds_T, positions_T, more + vocabulary, whole)[:, more:]
    seed_T11, position_T11 = seeds_T[:, None, None], positions_T[:, None, None]
    lanes, quarters = min(LANES, vocabulary), min(4, -(-vocabulary // LANES))
    blocks = torch.arange(-(-vocabulary // BLOCK.value), device=seeds_T.device)
    counters = (blocks[:, None] + first // BLOCK.value) * LANES
    counters = counters + torch.arange(lanes, device=seeds_T.device)
    counters = counters.expand(len(seeds_T), -1, -1)
    zeros = torch.zeros_like(counters)
    words = philox_ref([counters, zeros + (position_T11 & UINT32), zeros, zeros], seed_T11)
    words_TV = torch.stack(words[:quarters], dim=2).flatten(1)[:, :vocabulary]
    return words_to_gumbel_ref(words_TV)


def words_to_gumbel_ref(words: Tensor) -> Tensor:
    """-log(-log(u)) of 32-bit words held in int64."""
    is_near_one = words < NEAR_ONE
    below_one = (words.float() + 0.5) * WORD_UNIT
    mantissa, exponent = _split(((UINT32 - words).float() + 0.5) * WORD_UNIT)
    mantissa = torch.where(is_near_one, -below_one, mantissa)
    race = -_log1p(mantissa, torch.where(is_near_one, 0.0, exponent))
    return -_log1p(*_split(race))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = (1 + f) * 2^e with 1 + f in [sqrt(1/2), sqrt(2)); both float32."""
    bits = x.view(torch.int32) + (ONE_BITS - ROOT_HALF_BITS)
    exponent = ((bits >> 23) - 127).float()
    return ((bits & 0x7FFFFF) + ROOT_HALF_BITS).view(torch.float32) - 1.0, exponent


def _log1p(f: Tensor, exponent: Tensor) -> Tensor:
    """log((1 + f) * 2^exponent)."""
    polynomial = torch.full_like(f, _LOG_TERMS[0])
    for term in _LOG_TERMS[1:]:
        polynomial = polynomial * f + term
    square = f * f
    tail = f * square * polynomial + exponent * LN2_LOW
    return tail - square * 0.5 + f + exponent * LN2_HIGH


@triton.jit
def split(x):
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    return ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0, exponent


@triton.jit
def log1p(f, exponent):
    polynomial = 7.0376836292e-2 * f + -1.1514610310e-1
    polynomial = polynomial * f + 1.1676998740e-1
    polynomial = polynomial * f + -1.2420140846e-1
    polynomial = polynomial * f + 1.4249322787e-1
    polynomial = polynomial * f + -1.6668057665e-1
    polynomial = polynomial * f + 2.0000714765e-1
    polynomial = polynomial * f + -2.4999993993e-1
    polynomial = polynomial * f + 3.3333331174e-1
    square = f * f
    tail = f * square * polynomial + exponent * -2.12194440e-4
    return tail - square * 0.5 + f + exponent * 0.693359375


@triton.jit
def words_to_gumbel(words):
    """`words_to_gumbel_ref` of uint32 words."""
    is_near_one = words < 0x40000000
    below_one = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    mantissa, exponent = split(((words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10)
    mantissa = tl.where(is_near_one, -below_one, mantissa)
    race = -log1p(mantissa, tl.where(is_near_one, 0.0, exponent))
    mantissa, exponent = split(race)
    return -log1p(mantissa, exponent)


@triton.jit
def block_words(seed, position, block):
    """The words of one block of ids: quarter w of it takes the w-th."""
    counter = (block * QUARTER + tl.arange(0, QUARTER)).to(tl.uint32)
    zeros = counter & 0
    return tl.philox(seed, counter, zeros + position.to(tl.uint32), zeros, zeros)
