"""Draft head against its reference.

Regimes: vocabularies off the tile and smaller than one, k of 1 to 16 and k equal to the vocabulary,
rows off the tile and past one tile, ties within and across tiles, `d2t` offsets against ids, -inf
logits, NaN in one row, strided rows, no rows, bad arguments.
"""

import pytest
import torch

from aerie.kernels.draft_vocab import (
    MAX_K,
    _draft_vocab_op,
    _launch_config,
    draft_vocab,
    draft_vocab_ref,
)

# a logit is rounded once to the dtype (half a unit in the last place of values up to about 8)
# after a float32 sum of D products in another order
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CASES = [(1, 16, 1, 1), (3, 40, 63, 4), (5, 100, 200, 16), (17, 32, 130, 2), (0, 32, 64, 3)]


def _distinct_head(vocabulary, width, device):
    """Head and row whose logits are distinct integers, so that every order is exact."""
    head = torch.zeros(vocabulary, width, device=device)
    head[:, 0] = torch.randperm(vocabulary, device=device).float()
    return head


def _check(actual, expected, tolerance, assert_close):
    assert torch.equal(actual.ids_TA, expected.ids_TA)
    assert_close(actual.logprobs_TA, expected.logprobs_TA, tolerance)
    assert_close(actual.logsumexp_T, expected.logsumexp_T, tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_ref(case, device, dtypes, assert_close):
    rows, width, vocabulary, k = case
    for dtype in dtypes:
        # eighths of small integers: every sum is exact in every order, so the ids must agree
        hidden = torch.randint(-2, 3, (rows, width), device=device).to(dtype)
        head = (torch.randint(-4, 5, (vocabulary, width), device=device) / 8).to(dtype)
        d2t = torch.arange(vocabulary, device=device) * 2 + 3
        actual, expected = draft_vocab(hidden, head, d2t, k), draft_vocab_ref(hidden, head, d2t, k)
        _check(actual, expected, TOLERANCE[dtype], assert_close)
        assert actual.logprobs_TA.dtype == torch.float32


def test_real_values(device, dtypes, assert_close):
    for dtype in dtypes:
        hidden = torch.randn(4, 200, device=device).to(dtype)
        head = (torch.randn(300, 200, device=device) / 8).to(dtype)
        actual, expected = (
            draft_vocab(hidden, head, None, 5),
            draft_vocab_ref(hidden, head, None, 5),
        )
        assert_close(actual.logprobs_TA, expected.logprobs_TA, TOLERANCE[dtype])
        assert_close(actual.logsumexp_T, expected.logsumexp_T, TOLERANCE[dtype])
        logprobs = (hidden.double() @ head.double().t()).log_softmax(-1)
        chosen = logprobs.gather(1, actual.ids_TA).float()
        assert_close(actual.logprobs_TA, chosen, TOLERANCE[dtype])


@pytest.mark.parametrize("k", [1, 2, 7, MAX_K])
def test_order_is_falling(k, device):
    head, hidden = _distinct_head(400, 16, device), torch.eye(1, 16, device=device)
    expected = head[:, 0].argsort(descending=True)[None, :k]
    for op in (draft_vocab, draft_vocab_ref):
        tokens = op(hidden, head, None, k)
        assert torch.equal(tokens.ids_TA, expected)
        assert (tokens.logprobs_TA.diff() < 0).all()


def test_k_is_the_whole_vocabulary(device):
    head, hidden = _distinct_head(9, 16, device), torch.eye(1, 16, device=device)
    tokens = draft_vocab(hidden, head, None, 9)
    assert sorted(tokens.ids_TA[0].tolist()) == list(range(9))
    assert tokens.logprobs_TA.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("tied", [[3, 5, 60], [10, 140, 290], [127, 128]], ids=str)
def test_ties_go_to_the_lowest_draft_id(tied, device):
    head, hidden = torch.zeros(300, 16, device=device), torch.eye(1, 16, device=device)
    head[tied, 0] = 4.0
    d2t = 1000 - 2 * torch.arange(300, device=device)  # target ids fall as draft ids rise
    rest = [u for u in range(300) if u not in tied]
    expected = [1000 - u for u in (tied + rest)[:4]]
    for op in (draft_vocab, draft_vocab_ref):
        assert op(hidden, head, d2t, 4).ids_TA.tolist() == [expected]


def test_logits_are_rounded_to_the_dtype(device):
    """2049 rounds to 2048 in float16, so ids 5 and 90 tie and the lower one comes first."""
    head, hidden = (
        torch.zeros(100, 16, device=device).half(),
        torch.ones(1, 16, device=device).half(),
    )
    head[[5, 90], 0] = 2048.0
    head[90, 1] = 1.0
    for op in (draft_vocab, draft_vocab_ref):
        assert op(hidden, head, None, 2).ids_TA.tolist() == [[5, 90]]


def test_d2t_holds_offsets(device):
    head, hidden = _distinct_head(50, 16, device), torch.eye(1, 16, device=device)
    target_ids = torch.arange(50, device=device) * 3 + 7
    d2t = target_ids - torch.arange(50, device=device)
    plain = draft_vocab(hidden, head, None, 3).ids_TA
    for op in (draft_vocab, draft_vocab_ref):
        assert torch.equal(op(hidden, head, d2t, 3).ids_TA, target_ids[plain])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on unused padding columns
def test_minus_infinity_is_legal(device, assert_close):
    head, hidden = torch.zeros(300, 16, device=device), torch.eye(1, 16, device=device)
    head[:, 0] = -torch.inf
    head[[200, 290], 0] = torch.tensor([1.0, 2.0], device=device)
    hidden[0, 1:], head[:, 1:] = 1.0, 0.0
    actual, expected = draft_vocab(hidden, head, None, 4), draft_vocab_ref(hidden, head, None, 4)
    assert torch.equal(actual.ids_TA, expected.ids_TA)
    assert actual.ids_TA.tolist() == [[290, 200, 0, 1]]
    assert_close(actual.logprobs_TA[:, :2], expected.logprobs_TA[:, :2], TOLERANCE[torch.float32])
    assert (actual.logprobs_TA[:, 2:] == -torch.inf).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on a row of NaN
def test_nan_stays_in_its_row(device):
    hidden, head = torch.randn(3, 32, device=device), torch.randn(200, 32, device=device)
    d2t = torch.zeros(200, dtype=torch.int64, device=device)
    clean = draft_vocab(hidden, head, d2t, 3)
    hidden[1, 4] = torch.nan
    poisoned = draft_vocab(hidden, head, d2t, 3)
    assert torch.equal(poisoned.ids_TA[[0, 2]], clean.ids_TA[[0, 2]])
    assert torch.equal(poisoned.logprobs_TA[[0, 2]], clean.logprobs_TA[[0, 2]])
    assert poisoned.logsumexp_T[1].isnan()
    assert poisoned.logprobs_TA[1].isnan().all()
    assert ((poisoned.ids_TA >= 0) & (poisoned.ids_TA < 200)).all()


def test_nan_in_one_tile(device):
    hidden, head = torch.randn(2, 32, device=device), torch.randn(200, 32, device=device)
    head[150, 3] = torch.nan
    tokens = draft_vocab(hidden, head, None, 3)
    assert tokens.logsumexp_T.isnan().all()
    assert tokens.logprobs_TA.isnan().all()
    assert ((tokens.ids_TA >= 0) & (tokens.ids_TA < 200)).all()


def test_strided_rows(device, assert_close):
    hidden = torch.randn(3, 100, device=device)[:, 20:60]
    head = torch.randn(70, 90, device=device)[:, 10:50]
    actual, expected = draft_vocab(hidden, head, None, 2), draft_vocab_ref(hidden, head, None, 2)
    _check(actual, expected, TOLERANCE[torch.float32], assert_close)


def test_opcheck(device):
    hidden, head = torch.randn(2, 16, device=device), torch.randn(20, 16, device=device)
    torch.library.opcheck(_draft_vocab_op, (hidden, head, None, 2))
    d2t = torch.zeros(20, dtype=torch.int64, device=device)
    torch.library.opcheck(_draft_vocab_op, (hidden, head, d2t, 1))


def test_rejects_bad_arguments(device):
    hidden, head = torch.randn(2, 16, device=device), torch.randn(20, 16, device=device)
    with pytest.raises(ValueError, match="hidden_TD: must be 2-D"):
        draft_vocab(hidden[0], head, None, 1)
    with pytest.raises(ValueError, match="head_UD: must be 2-D .* got .* torch.float16"):
        draft_vocab(hidden, head.half(), None, 1)
    with pytest.raises(ValueError, match="head_UD: width must be 16"):
        draft_vocab(hidden, head[:, :8], None, 1)
    for k in (0, MAX_K + 1):
        with pytest.raises(ValueError, match=f"k: must be 1 to {MAX_K}"):
            draft_vocab(hidden, head, None, k)
    with pytest.raises(ValueError, match="and at most 2"):
        draft_vocab(hidden, head[:2], None, 3)
    with pytest.raises(ValueError, match=r"d2t_U: must be int64 \[20\]"):
        draft_vocab(hidden, head, torch.zeros(20, device=device), 1)


@pytest.mark.parametrize("vocabulary", [1, 63, 768, 32000, 202048])
@pytest.mark.parametrize("rows", [1, 17, 1000])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launch_config(rows, vocabulary, itemsize):
    config = _launch_config(rows, vocabulary, 10, itemsize)
    assert 16 <= config.BLOCK_T <= 64
    assert 1 <= config.BLOCK_N <= 2048
    stage = (config.BLOCK_U + config.BLOCK_T) * config.BLOCK_D * itemsize
    assert config.num_stages * stage <= 100 * 1024
