"""Draft head against its reference: ids exactly, log-probabilities against float64.

Regimes: vocabularies off the tile and smaller than one, k of 1 to 16 and k equal to the vocabulary,
the best k in one tile, spread over k tiles and over more tiles than the merge picks; rows off the
tile and past one tile; ties within and across tiles and of -0 with 0; `d2t` offsets against ids;
final norm, logit scale, FP8 head; rounding before the choice; -inf logits, a row and a head row of
NaN; layouts, rows beyond 2^31 elements; compilation; bad arguments.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerie.kernels.draft_logits import FinalNorm
from aerie.kernels.draft_vocab import (
    MAX_K,
    _draft_vocab_op,
    _launch_config,
    draft_vocab,
    draft_vocab_ref,
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

# rows, width, vocabulary, k
CASES = [(1, 16, 1, 1), (3, 40, 63, 4), (5, 100, 200, 16), (17, 32, 130, 2), (70, 20, 65, 1)]
EMPTY = (0, 32, 64, 3)
REAL = on_gpu((1, 5120, 32000, 1), (16, 5120, 32000, 8), (64, 5120, 202048, 16))


def _grid(rows, width, vocabulary, dtype, device):
    """Eighths of small integers: every sum is exact in every order, so the ids must agree."""
    hidden = torch.randint(-2, 3, (rows, width), device=device).to(dtype)
    head = (torch.randint(-4, 5, (vocabulary, width), device=device) / 8).to(dtype)
    return hidden, head


def _column(logits, device, dtype=torch.float32):
    """A row and a head whose logits are the given numbers."""
    head = torch.zeros(len(logits), 16, dtype=dtype, device=device)
    head[:, 0] = torch.as_tensor(logits, dtype=dtype, device=device)
    return torch.eye(1, 16, dtype=dtype, device=device), head


def _shuffled(vocabulary, device):
    return _column(torch.randperm(vocabulary).float(), device)


def _check(op, ref, *arguments):
    actual, eager, truth = run_guarded(op, *arguments), ref(*arguments), exact(ref, *arguments)
    assert torch.equal(actual.ids_TA, eager.ids_TA)
    assert_as_accurate(actual.logprobs_TA, truth.logprobs_TA, eager.logprobs_TA)
    assert_as_accurate(actual.logsumexp_T, truth.logsumexp_T, eager.logsumexp_T)


@pytest.mark.parametrize("case", [*CASES, EMPTY, *REAL], ids=str)
def test_matches_ref(case, device, dtypes):
    rows, width, vocabulary, k = case
    for dtype in dtypes:
        hidden, head = _grid(rows, width, vocabulary, dtype, device)
        d2t = torch.arange(vocabulary, device=device) * 2 + 3
        _check(draft_vocab, draft_vocab_ref, hidden, head, d2t, k)


@few_examples
@given(edges(16, 17), edges(64, 70), st.integers(1, 3), layouts(), layouts())
def test_any_shape_and_layout(device, rows, vocabulary, k, hidden_layout, head_layout):
    hidden, head = _grid(rows, 40, vocabulary, torch.float32, device)
    hidden, head = laid_out(hidden, hidden_layout), laid_out(head, head_layout)
    _check(draft_vocab, draft_vocab_ref, hidden, head, None, min(k, vocabulary))


@pytest.mark.parametrize("is_fp8", [False, True])
def test_norm_scale_and_fp8(is_fp8, device, dtypes):
    """Logprobs are those of the ids that were chosen, whichever of two close logits wins."""
    for dtype in dtypes:
        hidden = normal((4, 200), dtype, device) * 3
        head = normal((300, 200), torch.float32, device, seed=1)
        head = (head * 8).to(FP8) if is_fp8 else (head / 8).to(dtype)
        options = {"logit_scale": 0.7}
        options["scale_U"] = torch.rand(300, device=device) / 64 + 1 / 64 if is_fp8 else None
        gain = torch.rand(200, device=device).to(dtype) + 0.5
        d2t = torch.arange(300, device=device)
        args, options["norm"] = (hidden, head, d2t, 300), FinalNorm(gain, 1e-5)
        actual = draft_vocab(*args[:3], 5, **options)
        eager = draft_vocab_ref(*args, **options)
        options["norm"] = FinalNorm(gain.double(), 1e-5)
        wide = (hidden.double(), head if is_fp8 else head.double(), d2t, 300)
        truth = draft_vocab_ref(*wide, **options)
        assert_as_accurate(actual.logsumexp_T, truth.logsumexp_T, eager.logsumexp_T)
        chosen = [_of_ids(tokens, actual.ids_TA) for tokens in (truth, eager)]
        assert_as_accurate(actual.logprobs_TA, *chosen)
        assert_as_accurate(actual.logprobs_TA, truth.logprobs_TA[:, :5], eager.logprobs_TA[:, :5])


def _of_ids(tokens, ids_TA):
    """Log-probabilities of `ids_TA` among tokens that hold the whole vocabulary (2 u)."""
    by_id = torch.empty_like(tokens.logprobs_TA).scatter_(1, tokens.ids_TA // 2, tokens.logprobs_TA)
    return by_id.gather(1, ids_TA // 2)


@pytest.mark.parametrize("k", [1, 2, 7, MAX_K])
def test_order_is_falling(k, device):
    hidden, head = _shuffled(1700, device)  # 27 tiles, more than any k
    expected = head[:, 0].argsort(descending=True)[None, :k]
    for op in (draft_vocab, draft_vocab_ref):
        tokens = op(hidden, head, None, k)
        assert torch.equal(tokens.ids_TA, expected)
        assert (tokens.logprobs_TA.diff() < 0).all()


@pytest.mark.parametrize("start", [0, 60, 690])
def test_the_best_may_share_a_tile(start, device):
    logits = torch.zeros(706)
    logits[start : start + MAX_K] = torch.arange(1.0, MAX_K + 1)
    hidden, head = _column(logits, device)
    ids = list(range(start + MAX_K - 1, start - 1, -1))
    assert draft_vocab(hidden, head, None, MAX_K).ids_TA.tolist() == [ids]


def test_k_is_the_whole_vocabulary(device):
    hidden, head = _shuffled(9, device)
    tokens = draft_vocab(hidden, head, None, 9)
    assert sorted(tokens.ids_TA[0].tolist()) == list(range(9))
    assert tokens.logprobs_TA.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("tied", [[3, 5, 60], [10, 140, 290], [127, 128]], ids=str)
@pytest.mark.parametrize("value", [4.0, 0.0, -4.0])
def test_ties_go_to_the_lowest_draft_id(tied, value, device):
    logits = torch.full((300,), value - 1)
    logits[tied] = value
    hidden, head = _column(logits, device)
    d2t = 1000 - 2 * torch.arange(300, device=device)  # target ids fall as draft ids rise
    rest = [u for u in range(300) if u not in tied]
    expected = [1000 - u for u in (tied + rest)[:4]]
    for op in (draft_vocab, draft_vocab_ref):
        assert op(hidden, head, d2t, 4).ids_TA.tolist() == [expected]


def test_minus_zero_ties_with_zero(device):
    """-2^-26 rounds to -0 in float16."""
    hidden, head = _column([-1.0, -(2**-12), 0.0, -(2**-12), -2.0], device, torch.float16)
    for op in (draft_vocab, draft_vocab_ref):
        assert op(hidden * 2**-14, head, None, 4).ids_TA.tolist() == [[1, 2, 3, 0]]


def test_logits_are_rounded_to_the_dtype(device):
    """2049 rounds to 2048 in float16, so ids 5 and 90 tie and the lower one comes first."""
    head = torch.zeros(100, 16, device=device).half()
    hidden = torch.ones(1, 16, device=device).half()
    head[[5, 90], 0] = 2048.0
    head[90, 1] = 1.0
    for op in (draft_vocab, draft_vocab_ref):
        assert op(hidden, head, None, 2).ids_TA.tolist() == [[5, 90]]


def test_d2t_holds_offsets(device):
    hidden, head = _shuffled(50, device)
    target_ids = torch.arange(50, device=device) * 3 + 7
    d2t = target_ids - torch.arange(50, device=device)
    plain = draft_vocab(hidden, head, None, 3).ids_TA
    for op in (draft_vocab, draft_vocab_ref):
        assert torch.equal(op(hidden, head, d2t, 3).ids_TA, target_ids[plain])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on unused padding columns
def test_minus_infinity_is_legal(device):
    logits = torch.full((300,), -torch.inf)
    logits[[200, 290]] = torch.tensor([1.0, 2.0])
    hidden, head = _column(logits, device)
    hidden[0, 1:] = 1.0
    actual, eager = draft_vocab(hidden, head, None, 4), draft_vocab_ref(hidden, head, None, 4)
    truth = draft_vocab_ref(hidden.double(), head.double(), None, 4)
    assert actual.ids_TA.tolist() == eager.ids_TA.tolist() == [[290, 200, 0, 1]]
    assert_as_accurate(actual.logprobs_TA, truth.logprobs_TA, eager.logprobs_TA)
    assert (actual.logprobs_TA[:, 2:] == -torch.inf).all()


@pytest.mark.parametrize("op", [draft_vocab, draft_vocab_ref])
def test_tiny_logprob_of_a_sure_token(op, device):
    """Exact to 2^-23; a difference of logit and logsumexp has multiples of 80's last bit, 2^-17."""
    hidden, head = _column(torch.tensor([80.0, 68.0, 67.0] + [0.0] * 200), device)
    expected = -torch.tensor(math.exp(-12) + math.exp(-13)).log1p()
    logprob = op(hidden, head, None, 2).logprobs_TA[0, 0].cpu()
    torch.testing.assert_close(logprob, expected, rtol=0, atol=2**-23)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and inf
def test_rows_stay_apart(device):
    hidden, head = torch.randn(3, 32, device=device), torch.randn(200, 32, device=device)
    d2t = torch.zeros(200, dtype=torch.int64, device=device)
    check_rows_apart(lambda x: draft_vocab(x, head, d2t, 3), hidden, 1)
    hidden[1, 4] = torch.nan
    poisoned = draft_vocab(hidden, head, d2t, 3)
    assert poisoned.logsumexp_T[1].isnan()
    assert poisoned.logprobs_TA[1].isnan().all()
    assert ((poisoned.ids_TA >= 0) & (poisoned.ids_TA < 200)).all()


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
@pytest.mark.parametrize("k", [1, 3])
def test_nan_in_one_tile(nan, k, device):
    hidden, head = torch.randn(2, 32, device=device), torch.randn(200, 32, device=device)
    head[150, 3] = nan
    tokens = draft_vocab(hidden, head, None, k)
    assert tokens.logsumexp_T.isnan().all()
    assert tokens.logprobs_TA.isnan().all()
    assert ((tokens.ids_TA >= 0) & (tokens.ids_TA < 200)).all()


def test_head_beyond_32_bit_offsets(device):
    head = vast(64, torch.float16, device).as_strided((3, 32), (VAST // 2, 1))
    head[2, 5] = 2.0
    hidden = torch.ones(1, 32, device=device).half()
    assert draft_vocab(hidden, head, None, 2).ids_TA.tolist() == [[2, 0]]


def test_expanded_rows(device):
    hidden, head = _shuffled(70, device)
    assert draft_vocab(hidden.expand(3, 16), head, None, 2).ids_TA.unique(dim=0).shape == (1, 2)


def test_compiles_once_for_all_row_counts(device):
    hidden, head = _grid(5, 40, 70, torch.float32, device)
    check_compiles(draft_vocab, hidden[:2], head, None, 3, again=(hidden, head, None, 3))


def test_opcheck(device):
    hidden, head = torch.randn(2, 16, device=device), torch.randn(20, 16, device=device)
    gain, d2t = torch.ones(16, device=device), torch.zeros(20, dtype=torch.int64, device=device)
    torch.library.opcheck(_draft_vocab_op, (hidden, head, None, 2, None, 0.0, 1.0, None))
    torch.library.opcheck(_draft_vocab_op, (hidden, head, d2t, 1, gain, 1e-5, 0.5, None))


def test_rejects_bad_arguments(device):
    hidden, head = torch.randn(2, 16, device=device), torch.randn(20, 16, device=device)
    with pytest.raises(ValueError, match="hidden_TD: must be .* two-dimensional"):
        draft_vocab(hidden[0], head, None, 1)
    with pytest.raises(ValueError, match="head_UD: must be .* got torch.float16"):
        draft_vocab(hidden, head.half(), None, 1)
    with pytest.raises(ValueError, match=r"head_UD: must be \[F, 16\]"):
        draft_vocab(hidden, head[:, :8], None, 1)
    with pytest.raises(ValueError, match="scale_U: must be given with FP8 weights"):
        draft_vocab(hidden, head.to(FP8), None, 1)
    with pytest.raises(ValueError, match=r"norm.weight_D: must be a contiguous \[16\]"):
        draft_vocab(hidden, head, None, 1, norm=FinalNorm(hidden[0, :3], 1e-5))
    for k in (0, MAX_K + 1):
        with pytest.raises(ValueError, match=f"k: must be 1 to {MAX_K}"):
            draft_vocab(hidden, head, None, k)
    with pytest.raises(ValueError, match="and at most 2"):
        draft_vocab(hidden, head[:2], None, 3)
    offsets = torch.zeros(20, dtype=torch.int64, device=device)
    for bad in (offsets.float(), offsets[:5], offsets[:1].expand(20)):
        with pytest.raises(ValueError, match=r"d2t_U: must be a contiguous \[20\] of torch.int64"):
            draft_vocab(hidden, head, bad, 1)


@pytest.mark.parametrize("vocabulary", [1, 768, 32000, 202048])
@pytest.mark.parametrize("rows", [1, 17, 1000])
@pytest.mark.parametrize("itemsizes", [(2, 2), (4, 4), (2, 1), (4, 1)])
def test_launch_config(rows, vocabulary, itemsizes):
    config = _launch_config(HOPPER, rows, vocabulary, *itemsizes)
    assert 16 <= config.BLOCK_T <= 64
    assert (config.PARTS, config.SPLIT) == (1, False)
    stage = config.BLOCK_D * (config.BLOCK_F * itemsizes[1] + config.BLOCK_T * itemsizes[0])
    assert config.num_stages * stage <= 113 * 1024  # two programs per SM
