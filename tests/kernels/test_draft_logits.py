"""Draft logits against their reference in float64.

Regimes: vocabularies and rows off the tile, one of each and none; depth off the step; with and
without the final norm; rows so large or small that only the norm brings them back into float16;
logit scale with its second rounding; FP8 head with a scale per id and one for all; layouts, rows
beyond 2^31 elements of the head; NaN and inf of one row; compilation; bad arguments.
"""

import pytest
import torch
from hypothesis import given

from aerie.kernels.draft_logits import (
    FinalNorm,
    _draft_logits_op,
    _launch_config,
    draft_logits,
    draft_logits_ref,
)
from aerie.kernels.stream_launch import FP8
from aerie.kernels.target import HOPPER
from tests.evidence import (
    VAST,
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    edges,
    exact,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    vast,
)

# rows, width, vocabulary
SHAPES = [(1, 1, 1), (3, 127, 63), (16, 128, 64), (17, 129, 65), (65, 40, 70), (0, 32, 64)]
REAL = on_gpu((1, 5120, 32000), (16, 5120, 32000), (2048, 5120, 32000))


def _head(vocabulary, width, dtype, device):
    """A head and its scale (None unless FP8)."""
    head = normal((vocabulary, width), torch.float32, device, seed=1) / 8
    if dtype != FP8:
        return head.to(dtype), None
    return (head * 64).to(FP8), torch.rand(vocabulary, device=device) / 64 + 1 / 64


def _with_norm(hidden, head, gain, logit_scale, scale):
    norm = FinalNorm(gain, 1e-5)
    return draft_logits(hidden, head, norm=norm, logit_scale=logit_scale, scale_U=scale)


def _with_norm_ref(hidden, head, gain, logit_scale, scale):
    norm = FinalNorm(gain, 1e-5)
    return draft_logits_ref(hidden, head, norm=norm, logit_scale=logit_scale, scale_U=scale)


def _plain(hidden, head, logit_scale, scale):
    return draft_logits(hidden, head, logit_scale=logit_scale, scale_U=scale)


def _plain_ref(hidden, head, logit_scale, scale):
    return draft_logits_ref(hidden, head, logit_scale=logit_scale, scale_U=scale)


def _check(op, ref, *arguments):
    assert_as_accurate(run_guarded(op, *arguments), exact(ref, *arguments), ref(*arguments))


@pytest.mark.parametrize("shape", [*SHAPES, *REAL], ids=str)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_matches_truth(shape, is_fp8, device, dtypes):
    rows, width, vocabulary = shape
    for dtype in dtypes:
        hidden = normal((rows, width), dtype, device)
        head, scale = _head(vocabulary, width, FP8 if is_fp8 else dtype, device)
        gain = torch.rand(width, device=device).to(dtype) + 0.5
        _check(_plain, _plain_ref, hidden, head, 1.0, scale)
        _check(_with_norm, _with_norm_ref, hidden, head, gain, 0.7, scale)


@few_examples
@given(edges(16, 20), edges(64, 70), layouts(), layouts())
def test_any_shape_and_layout(device, rows, vocabulary, hidden_layout, head_layout):
    hidden = laid_out(normal((rows, 40), torch.float32, device), hidden_layout)
    head = laid_out(normal((vocabulary, 40), torch.float32, device, seed=1), head_layout)
    _check(_plain, _plain_ref, hidden, head, 1.0, None)


@pytest.mark.parametrize("size", [6e4, 2e-5])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_norm_brings_rows_back_into_float16(size, is_fp8, device):
    """A gain of 8 takes these rows out of float16's range before the norm takes them back."""
    hidden = (normal((3, 200), torch.float32, device).sign() * size).half()
    head, scale = _head(70, 200, FP8 if is_fp8 else torch.float16, device)
    gain = torch.full((200,), 8.0 if size > 1 else 0.125, device=device).half()
    norm = FinalNorm(gain, 1e-12)
    logits = draft_logits(hidden, head, norm=norm, scale_U=scale)
    wide = FinalNorm(gain.double(), 1e-12)
    truth = draft_logits_ref(hidden.double(), head if is_fp8 else head.double(), norm=wide,
                             scale_U=scale)  # fmt: skip
    assert_as_accurate(logits, truth, draft_logits_ref(hidden, head, norm=norm, scale_U=scale))


def test_logit_scale_rounds_the_rounded_logit(device):
    """1 + 1.875 * 2^-12 is 1 in float16; times 3 it would be 3 + 2^-9 if it were not rounded."""
    hidden = torch.tensor([[1.0, 2**-12, 0.875 * 2**-12]], device=device).half()
    head = torch.ones(2, 3, device=device).half()
    for op in (draft_logits, draft_logits_ref):
        assert op(hidden, head, logit_scale=3.0).tolist() == [[3.0, 3.0]]


def test_one_scale_for_all(device):
    hidden, (head, _) = normal((3, 40), torch.float32, device), _head(70, 40, FP8, device)
    one, each = torch.tensor([0.25], device=device), torch.full((70,), 0.25, device=device)
    assert torch.equal(_plain(hidden, head, 1.0, one), _plain(hidden, head, 1.0, each))
    _check(_plain, _plain_ref, hidden, head, 1.0, one)


def test_expanded_rows(device):
    hidden, (head, _) = normal((1, 40), torch.float32, device), _head(70, 40, torch.float32, device)
    assert torch.equal(draft_logits(hidden.expand(3, 40), head)[2:], draft_logits(hidden, head))


def test_head_beyond_32_bit_offsets(device):
    head = vast(64, torch.float16, device).as_strided((3, 32), (VAST // 2, 1))
    head[2, 5] = 2.0
    hidden = torch.ones(1, 32, device=device).half()
    assert draft_logits(hidden, head).tolist() == [[0.0, 0.0, 2.0]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on inf times 0
@pytest.mark.parametrize("is_fp8", [False, True])
def test_rows_stay_apart(is_fp8, device):
    hidden = normal((4, 40), torch.float16, device)
    head, scale = _head(70, 40, FP8 if is_fp8 else torch.float16, device)
    gain = torch.ones(40, device=device).half()
    check_rows_apart(lambda x: _with_norm(x, head, gain, 1.0, scale), hidden, 1)
    check_rows_apart(lambda x: _plain(x, head, 1.0, scale), hidden, 1)


def test_compiles_once_for_all_row_counts(device):
    hidden, gain = normal((5, 40), torch.float32, device), torch.ones(40, device=device)
    head, scale = _head(70, 40, FP8, device)
    rest = (head, gain, 0.5, scale)
    check_compiles(_with_norm, hidden[:2], *rest, again=(hidden, *rest))


def test_opcheck(device):
    hidden, gain = normal((2, 40), torch.float32, device), torch.ones(40, device=device)
    head, _ = _head(70, 40, torch.float32, device)  # opcheck cannot compare FP8 on the CPU
    torch.library.opcheck(_draft_logits_op, (hidden, head, gain, 1e-5, 0.5, None))
    torch.library.opcheck(_draft_logits_op, (hidden, head, None, 0.0, 1.0, None))


def test_rejects_bad_arguments(device):
    hidden, head = torch.randn(2, 16, device=device), torch.randn(20, 16, device=device)
    codes, scale = head.to(FP8), torch.ones(20, device=device)
    with pytest.raises(ValueError, match="hidden_TD: must be .* two-dimensional"):
        draft_logits(hidden[0], head)
    with pytest.raises(ValueError, match="hidden_TD: must be float32"):
        draft_logits(hidden.double(), head.double())
    with pytest.raises(ValueError, match="head_UD: must be torch.float32 or .* got torch.float16"):
        draft_logits(hidden, head.half())
    with pytest.raises(ValueError, match=r"head_UD: must be \[F, 16\]"):
        draft_logits(hidden, head[:, :8])
    with pytest.raises(ValueError, match="scale_U: must be given with FP8 weights"):
        draft_logits(hidden, codes)
    with pytest.raises(ValueError, match="scale_U: must be given with FP8 weights"):
        draft_logits(hidden, head, scale_U=scale)
    with pytest.raises(ValueError, match=r"scale_U: must be a contiguous \[20\] or \[1\]"):
        draft_logits(hidden, codes, scale_U=scale[:3])
    with pytest.raises(ValueError, match=r"norm.weight_D: must be a contiguous \[16\]"):
        draft_logits(hidden, head, norm=FinalNorm(torch.ones(8, device=device), 1e-5))
    with pytest.raises(ValueError, match="norm.weight_D: .* got .* torch.float16"):
        draft_logits(hidden, head, norm=FinalNorm(torch.ones(16, device=device).half(), 1e-5))


@pytest.mark.parametrize("vocabulary", [1, 768, 32000, 202048])
@pytest.mark.parametrize("rows", [1, 17, 4096])
@pytest.mark.parametrize("itemsizes", [(2, 2), (4, 4), (2, 1), (4, 1)])
def test_launch_config_does_not_split_the_depth(rows, vocabulary, itemsizes):
    config = _launch_config(HOPPER, rows, vocabulary, *itemsizes)
    assert (config.PARTS, config.SPLIT) == (1, False)
    assert config.BLOCK_T >= 16
