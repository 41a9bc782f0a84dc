"""RoPE (and the weightless norm) against its reference and against Hugging Face.

Regimes: both layouts, with and without the norm, 5:1 heads, head dims off a power of two, heads on
both sides of what a program takes, no rows, strided and expanded queries, NaN in one head, infinity
in one row, writes outside the outputs, unequal runs, bad arguments.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, apply_rotary_emb

from aerie.kernels.rope import _launch_config, _rope_op, rope, rope_ref
from aerie.kernels.rotation import Rotation, inverse_frequencies, rotation_ref
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    edges,
    exact,
    few_examples,
    laid_out,
    layouts,
    on_gpu,
    run_guarded,
    same_bits,
)

EPS = 1e-5
PAIRINGS = ["interleaved", "half"]
CASES = [(1, 10, 2, 32), (3, 5, 1, 16), (2, 3, 3, 24), (2, 40, 8, 96), (0, 4, 2, 16)]  # T, H, G, K
EDGES = [(1, 31, 33, 32), (3, 11, 1, 32)]  # 32 heads of 32 fill a program
REAL = on_gpu((1, 40, 8, 128), (64, 40, 8, 128), (4096, 40, 8, 128))


def make_inputs(case, device, dtype=torch.float32):
    rows, heads, kv_heads, head_dim = case
    q = torch.randn(rows, heads, head_dim, device=device).to(dtype)
    k = torch.randn(rows, kv_heads, head_dim, device=device).to(dtype)
    positions = torch.randint(300, (rows,), device=device)
    return q, k, rotation_ref(positions, inverse_frequencies(head_dim, 1e4, None).to(device))


def _check(*arguments, runs=2):
    actual = run_guarded(rope, *arguments, runs=runs)
    truth, eager = exact(rope_ref, *arguments), rope_ref(*arguments)
    assert_as_accurate(actual.q_THK, truth.q_THK, eager.q_THK)
    assert_as_accurate(actual.k_TGK, truth.k_TGK, eager.k_TGK)
    return actual


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("eps", [None, EPS], ids=["plain", "normed"])
@pytest.mark.parametrize("case", [*CASES, *EDGES, *REAL], ids=str)
def test_as_accurate_as_eager(case, eps, pairing, device, dtypes):
    for dtype in dtypes:
        _check(*make_inputs(case, device, dtype), pairing, eps)


@few_examples
@given(edges(2, 3), edges(4, 9), st.sampled_from([2, 16, 62, 64, 66]), layouts(), st.booleans())
def test_any_shape_and_layout(device, rows, heads, head_dim, layout, norm):
    torch.manual_seed(heads)
    q, k, rotation = make_inputs((rows, heads, 2, head_dim), device, torch.float16)
    pairing, eps = PAIRINGS[heads % 2], EPS if norm else None
    _check(laid_out(q, layout), laid_out(k, layout), rotation, pairing, eps, runs=1)


def test_ref_equals_hugging_face_llama4():
    q, k, rotation = make_inputs((4, 10, 2, 32), "cpu", torch.bfloat16)
    phase = torch.complex(rotation.cos_TJ, rotation.sin_TJ)[None]
    norm = Llama4TextL2Norm(EPS)
    expected_q, expected_k = (norm(x)[0] for x in apply_rotary_emb(q[None], k[None], phase))
    actual = rope_ref(q, k, rotation, "interleaved", EPS)
    torch.testing.assert_close(actual.q_THK, expected_q)
    torch.testing.assert_close(actual.k_TGK, expected_k)


def test_ref_equals_hugging_face_llama():
    q, k, rotation = make_inputs((4, 6, 2, 32), "cpu")
    cos, sin = (torch.cat((x, x), dim=-1)[None] for x in (rotation.cos_TJ, rotation.sin_TJ))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    actual = rope_ref(q, k, rotation, "half", None)
    torch.testing.assert_close(actual.q_THK, expected[0][0].transpose(0, 1))
    torch.testing.assert_close(actual.k_TGK, expected[1][0].transpose(0, 1))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_layout_changes_no_bit(pairing, device):
    _, _, rotation = make_inputs((3, 1, 1, 16), device)
    fused = torch.randn(3, 14 * 16, device=device)
    q, k = (x.unflatten(-1, (-1, 16)) for x in fused.split((10 * 16, 2 * 16, 2 * 16), dim=-1)[:2])
    actual = _check(q, k, rotation, pairing, EPS)
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(rope(swapped, k, rotation, pairing, EPS).q_THK, actual.q_THK)
    expanded = q[:, :1].expand(3, 10, 16)
    actual = rope(expanded, k, rotation, pairing, EPS)
    assert same_bits(actual.q_THK, rope(expanded.clone(), k, rotation, pairing, EPS).q_THK)


def test_nan_and_infinity_stay_in_their_row(device):
    q, k, rotation = make_inputs((3, 5, 1, 24), device)
    check_rows_apart(lambda x: rope(x, k, rotation, "half", EPS), q, 1)
    check_rows_apart(lambda x: rope(q, x, rotation, "interleaved", EPS), k, 1)


def test_nan_stays_in_its_head(device):
    q, k, rotation = make_inputs((2, 5, 1, 24), device)
    clean = rope(q, k, rotation, "interleaved", EPS)
    q[1, 3, 7] = torch.nan
    poisoned = rope(q, k, rotation, "interleaved", EPS)
    dirty = poisoned.q_THK.isnan().all(dim=-1)
    assert dirty.nonzero().tolist() == [[1, 3]]
    assert torch.equal(poisoned.q_THK[~dirty], clean.q_THK[~dirty])
    assert torch.equal(poisoned.k_TGK, clean.k_TGK)


def test_norm_of_a_zero_head_is_zero(device):
    q, k, rotation = make_inputs((1, 2, 1, 16), device)
    assert not rope(torch.zeros_like(q), k, rotation, "half", EPS).q_THK.any()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_compiles_once_for_all_row_counts(pairing, device):
    q, k, rotation = make_inputs((5, 4, 2, 16), device)
    two = Rotation(rotation.cos_TJ[:2], rotation.sin_TJ[:2])
    check_compiles(rope, *(q[:2], k[:2], two, pairing, EPS), again=(q, k, rotation, pairing, EPS))


def test_opcheck(device):
    q, k, rotation = make_inputs((2, 4, 2, 16), device)
    angles = (rotation.cos_TJ, rotation.sin_TJ)
    torch.library.opcheck(_rope_op, (q, k, *angles, True, EPS))
    torch.library.opcheck(
        _rope_op, (q.transpose(0, 1).contiguous().transpose(0, 1), k, *angles, False, None)
    )


def test_rejects_bad_arguments(device):
    q, k, rotation = make_inputs((2, 4, 2, 16), device)
    with pytest.raises(ValueError, match="layout: must be 'interleaved' or 'half', got 'neox'"):
        rope(q, k, rotation, "neox", None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"q_THK: must be \[T, heads, K\]"):
        rope(q[0], k, rotation, "half", None)
    with pytest.raises(ValueError, match="k_TGK: .*contiguous last dimension"):
        rope(q, k.transpose(1, 2), rotation, "half", None)
    with pytest.raises(ValueError, match=r"q_THK: must be \[2, heads, 16\] to fit the rotation"):
        rope(q[:1], k, rotation, "half", None)
    with pytest.raises(ValueError, match=r"k_TGK: must be \[2, heads, 16\] to fit the rotation"):
        rope(q, k[..., :8], rotation, "half", None)
    with pytest.raises(ValueError, match="k_TGK: must be torch.float32 like q_THK"):
        rope(q, k.half(), rotation, "half", None)
    sliced = Rotation(*(x.repeat(1, 2)[:, :8] for x in (rotation.cos_TJ, rotation.sin_TJ)))
    with pytest.raises(ValueError, match="rotation: must be two contiguous"):
        rope(q, k, sliced, "half", None)
    wide = Rotation(torch.ones(1, 129, device=device), torch.ones(1, 129, device=device))
    with pytest.raises(ValueError, match="at most 256"):
        rope(torch.ones(1, 1, 258, device=device), k, wide, "half", None)


def test_rejects_sines_unlike_the_cosines(device):
    q, k, rotation = make_inputs((2, 4, 2, 16), device)
    for sin in (rotation.sin_TJ[:1], rotation.sin_TJ.half()):
        with pytest.raises(ValueError, match="rotation: must be"):
            rope(q, k, Rotation(rotation.cos_TJ, sin), "half", None)


def test_rejects_float64(device):
    q, k, rotation = make_inputs((2, 4, 2, 16), device, torch.float64)
    with pytest.raises(ValueError, match="q_THK: must be float32, float16 or bfloat16"):
        rope(q, k, rotation, "half", None)


@pytest.mark.parametrize("pairs", [1, 12, 64, 128])
def test_launch_config(pairs):
    config = _launch_config(pairs)
    assert pairs <= config.BLOCK_J < 2 * pairs
    assert config.BLOCK_HEADS >= 1
    assert config.BLOCK_HEADS & (config.BLOCK_HEADS - 1) == 0
