"""Rotation angles against their reference, and frequencies against Hugging Face.

Regimes: no scaling, a blended band, an empty band (low == high, where Hugging Face's own formula is
0 / 0), positions far beyond a turn, pairs off a power of two, rows on both sides of what a program
takes, no rows, writes outside the outputs, unequal runs, bad arguments.
"""

import pytest
import torch
from hypothesis import given
from transformers import Llama4TextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding

from aerie.kernels.rotation import (
    Llama3Scaling,
    _launch_config,
    _rotation_op,
    inverse_frequencies,
    rotation,
    rotation_ref,
)
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    edges,
    few_examples,
    on_gpu,
    run_guarded,
)

TOLERANCE = 1e-6  # sine and cosine of the same float32 angle by two libraries
CASES = [(1, 2), (5, 96), (7, 128), (8, 128), (9, 128), (33, 64), (0, 32)]  # T, K; 8 x 64 a program
REAL = on_gpu((1, 128), (64, 128), (4096, 128))
BASE = Llama3Scaling(8.0, 1.0, 4.0, 8192)
SCOUT = Llama3Scaling(16.0, 1.0, 1.0, 8192)


def hugging_face_config(head_dim: int, theta: float, scaling: Llama3Scaling | None):
    parameters = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        parameters |= {"rope_type": "llama3"} | vars(scaling)
    return Llama4TextConfig(head_dim=head_dim, rope_parameters=parameters)


@pytest.mark.parametrize("head_dim", [2, 32, 96, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [BASE, SCOUT, None], ids=["base", "scout", "none"])
def test_frequencies_equal_hugging_face(head_dim, theta, scaling):
    config = hugging_face_config(head_dim, theta, scaling)
    if scaling is None:
        expected, _ = Llama4TextRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    assert torch.equal(inverse_frequencies(head_dim, theta, scaling), expected)


def test_empty_band_is_never_nan():
    # the first wavelength, 2 pi, is exactly the original context: neither fast nor slow
    scaling = Llama3Scaling(16.0, 1.0, 1.0, 2 * torch.pi)  # pyright: ignore[reportArgumentType]
    plain_J = inverse_frequencies(64, 10000.0, None)
    assert torch.equal(inverse_frequencies(64, 10000.0, scaling), plain_J / 16)


def _check(positions, inv_freq):
    actual, eager = run_guarded(rotation, positions, inv_freq), rotation_ref(positions, inv_freq)
    angle = (positions.float()[:, None] * inv_freq).double()  # the angle is float32, as documented
    assert_as_accurate(actual.cos_TJ, angle.cos(), eager.cos_TJ)
    assert_as_accurate(actual.sin_TJ, angle.sin(), eager.sin_TJ)


@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_as_accurate_as_eager(case, device):
    rows, head_dim = case
    positions = torch.randint(10000, (rows,), device=device)
    _check(positions, inverse_frequencies(head_dim, 500000.0, SCOUT).to(device))


@few_examples
@given(edges(8, 20), edges(64, 70))
def test_any_shape(device, rows, pairs):
    positions = torch.arange(rows, device=device) * 977
    _check(positions, inverse_frequencies(2 * pairs, 10000.0, None).to(device))


def test_far_positions(device):
    positions = torch.tensor([0, 8191, 8192, 131072, 10_485_759], device=device)
    _check(positions, inverse_frequencies(128, 500000.0, None).to(device))


def test_compiles_once_for_all_row_counts(device):
    positions, inv_freq = torch.arange(5, device=device), torch.ones(16, device=device)
    check_compiles(rotation, positions[:2], inv_freq, again=(positions, inv_freq))


def test_ref_equals_hugging_face():
    config = hugging_face_config(128, 500000.0, BASE)
    positions = torch.tensor([0, 1, 77, 8192, 262_143])
    phase = Llama4TextRotaryEmbedding(config)(torch.empty(0), positions[None])[0]
    actual = rotation_ref(positions, inverse_frequencies(128, 500000.0, BASE))
    torch.testing.assert_close(actual.cos_TJ, phase.real, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(actual.sin_TJ, phase.imag, rtol=0, atol=TOLERANCE)


def test_opcheck(device):
    inv_freq = inverse_frequencies(32, 10000.0, None).to(device)
    torch.library.opcheck(_rotation_op, (torch.tensor([0, 5, 900], device=device), inv_freq))


def test_rejects_bad_arguments(device):
    positions, inv_freq = torch.arange(4, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match="positions_T: must be .*int64"):
        rotation(positions.int(), inv_freq)
    with pytest.raises(ValueError, match="positions_T: must be a contiguous one-dimensional"):
        rotation(positions[::2], inv_freq)
    with pytest.raises(ValueError, match="positions_T: must be a contiguous one-dimensional"):
        rotation(positions[:1].expand(4), inv_freq)
    with pytest.raises(ValueError, match="inv_freq_J: must be a contiguous one-dimensional"):
        rotation(positions, inv_freq[::2])
    with pytest.raises(ValueError, match="inv_freq_J: must be .*float32"):
        rotation(positions, inv_freq.half())
    with pytest.raises(ValueError, match="head_dim: must be even"):
        inverse_frequencies(63, 10000.0, None)


@pytest.mark.parametrize("pairs", [1, 48, 64, 128])
def test_launch_config(pairs):
    config = _launch_config(pairs)
    assert pairs <= config.BLOCK_J < 2 * pairs
    assert config.BLOCK_T >= 1
    assert config.BLOCK_T & (config.BLOCK_T - 1) == 0
