"""RoPE (and the weightless norm) against its reference and against Hugging Face.

Regimes: both layouts, with and without the norm, 5:1 heads, head dims off a power of two, more
heads than a program takes, no rows, views of a fused projection, NaN in one head, bad arguments.
"""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm, apply_rotary_emb

from aerie.kernels.rope import _launch_config, _rope_op, rope, rope_ref
from aerie.kernels.rotation import Rotation, inverse_frequencies, rotation_ref

EPS = 1e-5
LAYOUTS = ["interleaved", "half"]
CASES = [(1, 10, 2, 32), (3, 5, 1, 16), (2, 3, 3, 24), (2, 40, 8, 96), (0, 4, 2, 16)]  # T, H, G, K
# two roundings to the dtype (rotation, norm), each of which may fall to either neighbour
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make_inputs(case, device, dtype=torch.float32):
    rows, heads, kv_heads, head_dim = case
    q = torch.randn(rows, heads, head_dim, device=device).to(dtype)
    k = torch.randn(rows, kv_heads, head_dim, device=device).to(dtype)
    positions = torch.randint(300, (rows,), device=device)
    return q, k, rotation_ref(positions, inverse_frequencies(head_dim, 1e4, None).to(device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("eps", [None, EPS], ids=["plain", "normed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_ref(case, eps, layout, device, dtypes, assert_close):
    for dtype in dtypes:
        q, k, rotation = make_inputs(case, device, dtype)
        actual, expected = (f(q, k, rotation, layout, eps) for f in (rope, rope_ref))
        assert_close(actual.q_THK, expected.q_THK, TOLERANCE[dtype])
        assert_close(actual.k_TGK, expected.k_TGK, TOLERANCE[dtype])


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_of_a_fused_projection(layout, device, assert_close):
    _, _, rotation = make_inputs((3, 1, 1, 16), device)
    fused = torch.randn(3, 14 * 16, device=device)
    q, k = (x.unflatten(-1, (-1, 16)) for x in fused.split((10 * 16, 2 * 16, 2 * 16), dim=-1)[:2])
    actual, expected = (f(q, k, rotation, layout, EPS) for f in (rope, rope_ref))
    assert_close(actual.q_THK, expected.q_THK, TOLERANCE[q.dtype])
    assert_close(actual.k_TGK, expected.k_TGK, TOLERANCE[q.dtype])
    swapped = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(rope(swapped, k, rotation, layout, EPS).q_THK, actual.q_THK)


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
    with pytest.raises(ValueError, match="rotation: must be contiguous"):
        rope(q, k, sliced, "half", None)
    wide = Rotation(torch.ones(1, 129, device=device), torch.ones(1, 129, device=device))
    with pytest.raises(ValueError, match="at most 256"):
        rope(torch.ones(1, 1, 258, device=device), k, wide, "half", None)


@pytest.mark.parametrize("pairs", [1, 12, 64, 128])
def test_launch_config(pairs):
    config = _launch_config(pairs)
    assert pairs <= config.BLOCK_J < 2 * pairs
    assert config.BLOCK_HEADS >= 1
    assert config.BLOCK_HEADS & (config.BLOCK_HEADS - 1) == 0
