"""Noise against published vectors, against float64, and bit by bit between eager and kernel.

Regimes: known answers of Philox4x32-10; words of every size class, at both ends and around the
switch between the two logarithms; blocks other than the first, seeds and positions beyond 32 bits;
noise that does not depend on who asks for it; the law of the noise.
"""

import math

import pytest
import torch
import triton
import triton.language as tl

from aerie.kernels.gumbel import (
    BLOCK,
    NEAR_ONE,
    QUARTER,
    block_words,
    gumbel_ref,
    philox_ref,
    words_to_gumbel,
    words_to_gumbel_ref,
)
from tests.evidence import same_bits

# Random123's kat_vectors: counter, key, output
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def _noise_kernel(seed, position, block, noise_ptr):
    words = block_words(seed.to(tl.int64), position.to(tl.int64), block)
    for quarter in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        lanes = quarter * QUARTER + tl.arange(0, QUARTER)
        tl.store(noise_ptr + lanes, words_to_gumbel(words[quarter]))


@triton.jit
def _words_kernel(words_ptr, noise_ptr, BLOCK_N: tl.constexpr):
    n = tl.arange(0, BLOCK_N)
    tl.store(noise_ptr + n, words_to_gumbel(tl.load(words_ptr + n).to(tl.uint32)))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_its_published_answers(counter, key, expected):
    words = philox_ref([torch.tensor([c]) for c in counter], torch.tensor([key]))
    assert [int(word) for word in words] == list(expected)


@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-7, 12), (2**62 + 1, 2**31 - 1)])
def test_kernel_has_the_same_bits(seed, position, block, device):
    noise = torch.empty(BLOCK.value, device=device)
    _noise_kernel[(1,)](seed, position, block, noise, enable_fp_fusion=False)
    ids = torch.tensor([seed], device=device), torch.tensor([position], device=device)
    expected = gumbel_ref(*ids, (block + 1) * BLOCK.value)[0, block * BLOCK.value :]
    assert same_bits(noise, expected)


def _words() -> torch.Tensor:
    edges = [torch.arange(500), 2**32 - 1 - torch.arange(500), NEAR_ONE + torch.arange(-500, 500)]
    powers = 2 ** torch.arange(32)
    return torch.cat([*edges, powers, powers - 1, torch.randint(2**32, (30_000 - 64,))])


def test_accurate_against_float64():
    """An absolute error is a relative error of a probability: below 2^-19 everywhere."""
    words = _words()
    race = -torch.log1p(-(words.double() + 0.5) / 2**32)
    error = (words_to_gumbel_ref(words).double() + race.log()).abs().max().item()
    assert error < 2**-19


def test_words_have_the_same_bits(device):
    words = _words()[: 2**14].to(device)
    noise = torch.empty(len(words), device=device)
    _words_kernel[(1,)](words, noise, BLOCK_N=2**14, enable_fp_fusion=False)
    assert same_bits(noise, words_to_gumbel_ref(words))


def test_noise_depends_on_seed_position_and_id_alone():
    seeds, positions = torch.tensor([3, 4, 3]), torch.tensor([5, 5, 6])
    noise = gumbel_ref(seeds, positions, 5000)
    for t in range(3):
        alone = gumbel_ref(seeds[t : t + 1], positions[t : t + 1], 1500)[0]
        assert same_bits(noise[t, :1500], alone)
    assert len(noise.unique()) > 14_900  # rows differ, blocks differ, quarters differ


def test_law():
    """Kolmogorov-Smirnov against exp(-exp(-x)); 1e-6 quantile of the statistic."""
    noise = gumbel_ref(torch.tensor([11]), torch.tensor([2]), 200_000)[0].double().sort().values
    law = torch.exp(-torch.exp(-noise))
    steps = torch.arange(1, len(law) + 1) / len(law)
    assert (law - steps).abs().max() < math.sqrt(math.log(2e6) / 2 / len(law))
