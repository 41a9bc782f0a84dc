"""Target probabilities of chosen ids against a softmax over what a row keeps.

Regimes: ids in any order, repeated, at both ends, pads of -1 and ids beyond the vocabulary; ids
that a filter drops and ties it cuts; greedy rows as one-hot; the whole vocabulary sums to 1; draft
ids through offsets, without a map, widths off the block; layouts, expanded ids, rows beyond 2^31
elements; rows of NaN; no rows, no ids; compilation; bad arguments.
"""

from dataclasses import fields, replace

import pytest
import torch

from aerie.kernels.row_filter import row_filter, row_filter_ref
from aerie.kernels.target_probs import (
    _launch_config,
    _target_probs_op,
    draft_vocab_probs,
    draft_vocab_probs_ref,
    target_probs,
    target_probs_ref,
)
from tests.evidence import (
    LAYOUTS,
    VAST,
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    laid_out,
    normal,
    on_gpu,
    run_guarded,
    vast,
)

TEMPERATURE, TOP_K, TOP_P = [1.0, 0.7, 0.0, 1.5], [0, 9, 3, 40], [1.0, 1.0, 0.5, 0.9]
REAL = on_gpu(202048)


def _settings(device):
    values = (TEMPERATURE, TOP_K, TOP_P)
    return [torch.tensor(value, device=device) for value in values]


def _softmax(logits, settings):
    """Truth: float64 softmax of the logits that a sort keeps, from nothing but the rule."""
    probs = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    for t, (temperature, k, p) in enumerate(zip(*[s.tolist() for s in settings], strict=True)):
        order = logits[t].double().sort(descending=True, stable=True).indices
        if temperature == 0:
            probs[t, order[0]] = 1.0
            continue
        order = order[: k or None]
        mass = (logits[t, order].double() / temperature).softmax(dim=0)
        kept = 1 + int((mass.cumsum(dim=0) < p).sum()) if p < 1 else len(order)
        probs[t, order[:kept]] = mass[:kept] / mass[:kept].sum()
    return probs


@pytest.mark.parametrize("vocabulary", [1, 300, *REAL])
def test_matches_softmax(vocabulary, device, dtypes):
    for dtype in dtypes:
        logits, settings = normal((4, vocabulary), dtype, device) * 2, _settings(device)
        ids = torch.arange(vocabulary, device=device).flip(0).expand(4, vocabulary)
        actual = run_guarded(target_probs, logits, ids, row_filter(logits, *settings))
        eager = target_probs_ref(logits, ids, row_filter_ref(logits, *settings))
        truth = _softmax(logits, settings).flip(1)
        assert torch.equal(actual > 0, truth > 0)
        assert_as_accurate(actual, truth, eager)
        assert actual.sum(dim=1).tolist() == pytest.approx([1.0] * 4, abs=2e-6)


def test_pads_and_foreign_ids_have_none(device):
    logits, settings = normal((4, 300), torch.float32, device), _settings(device)
    ids = torch.tensor([[0, -1, 299, 300, 2**31, 7, 7, -(2**40)]], device=device).repeat(4, 1)
    truth = _softmax(logits, settings)
    for op, made in ((target_probs, row_filter), (target_probs_ref, row_filter_ref)):
        probs = op(logits, ids, made(logits, *settings))
        assert (probs[:, [1, 3, 4, 7]] == 0).all()
        inside = truth[:, [0, 299, 7, 7]].float()
        assert torch.allclose(probs[:, [0, 2, 5, 6]], inside, rtol=1e-5, atol=0)


def test_ties_are_cut_by_id(device):
    logits = torch.zeros(1, 10, device=device)
    kept = row_filter(logits, torch.ones(1, device=device), torch.tensor([4], device=device))
    ids = torch.arange(10, device=device)[None]
    assert target_probs(logits, ids, kept).tolist() == [pytest.approx([0.25] * 4 + [0.0] * 6)]


@pytest.mark.parametrize("width", [1, 130, 1025])
def test_draft_vocabulary(width, device):
    logits, settings = normal((4, 2100), torch.float32, device) * 2, _settings(device)
    d2t = torch.arange(width, device=device) + 1  # ids 1, 3, 5, ...: read as ids they were 1, 2, 3
    kept, truth = row_filter_ref(logits, *settings), _softmax(logits, settings)
    actual = run_guarded(draft_vocab_probs, logits, d2t, width, kept)
    eager = draft_vocab_probs_ref(logits, d2t, width, row_filter_ref(logits, *settings))
    assert_as_accurate(actual, truth[:, 1 : 2 * width : 2], eager)
    first = draft_vocab_probs(logits, None, width, kept)
    eager = draft_vocab_probs_ref(logits, None, width, row_filter_ref(logits, *settings))
    assert_as_accurate(first, truth[:, :width], eager)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    logits, ids = normal((4, 70), torch.float32, device), torch.randint(70, (4, 9), device=device)
    kept = row_filter(logits, *_settings(device))
    expected = target_probs(logits, ids, kept)
    assert torch.equal(
        target_probs(laid_out(logits, layout), laid_out(ids, layout), kept), expected
    )


def test_row_beyond_32_bit_offsets(device):
    logits = vast(100, torch.float16, device).as_strided((3, 70), (VAST // 2, 1))
    logits[2, 41] = 2.0
    kept = row_filter(logits, torch.zeros(3, device=device))
    ids = torch.tensor([[0, 41]], device=device).expand(3, 2)
    assert target_probs(logits, ids, kept).tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and inf
def test_rows_stay_apart(device):
    logits, settings = normal((4, 70), torch.float16, device), _settings(device)
    ids = torch.arange(70, device=device).expand(4, 70)
    check_rows_apart(lambda x: target_probs(x, ids, row_filter(x, *settings)), logits, 1)
    logits[1, 3] = torch.nan
    for op, made in ((target_probs, row_filter), (target_probs_ref, row_filter_ref)):
        probs = op(logits, ids, made(logits, *settings))
        assert probs.isnan().all(dim=1).tolist() == [False, True, False, False]


@pytest.mark.parametrize(("rows", "width"), [(0, 3), (4, 0)])
def test_nothing_to_gather(rows, width, device):
    logits = normal((4, 70), torch.float32, device)[:rows]
    kept = row_filter(logits, torch.ones(rows, device=device))
    ids = torch.zeros(rows, width, dtype=torch.int64, device=device)
    assert target_probs(logits, ids, kept).shape == (rows, width)


def test_compiles_once_for_all_row_counts(device):
    logits, ids = normal((4, 40), torch.float32, device), torch.randint(40, (4, 7), device=device)
    kept = row_filter(logits, *_settings(device))
    few = replace(kept, **{f.name: getattr(kept, f.name)[:2] for f in fields(kept)})
    check_compiles(target_probs, logits[:2], ids[:2], few, again=(logits, ids, kept))


def test_opcheck(device):
    logits, ids = normal((4, 40), torch.float32, device), torch.randint(40, (4, 7), device=device)
    kept = row_filter(logits, *_settings(device))
    columns = [getattr(kept, f.name) for f in fields(kept)]
    torch.library.opcheck(_target_probs_op, (logits, ids, columns, 7, False))
    torch.library.opcheck(_target_probs_op, (logits, ids[0].clone(), columns, 7, True))
    torch.library.opcheck(_target_probs_op, (logits, None, columns, 40, False))


def test_rejects_bad_arguments(device):
    logits, ids = normal((4, 40), torch.float32, device), torch.randint(40, (4, 7), device=device)
    kept = row_filter(logits, *_settings(device))
    for bad in (logits[0], logits.t(), logits.double()):
        with pytest.raises(ValueError, match="logits_TV: must be float32, float16 or bfloat16"):
            target_probs(bad, ids, kept)
    for bad in (ids[0], ids[:2], ids.int(), ids.t().contiguous().t()):
        with pytest.raises(ValueError, match=r"ids_TA: must be int64 \[4, A\]"):
            target_probs(logits, bad, kept)
    with pytest.raises(ValueError, match=r"row_filter.last_id_T: must be a contiguous \[4\]"):
        target_probs(logits, ids, replace(kept, last_id_T=kept.last_id_T.long()))
    with pytest.raises(ValueError, match="vocabulary: must be at least 1"):
        draft_vocab_probs(logits, None, 0, kept)
    with pytest.raises(ValueError, match=r"d2t_U: must be a contiguous \[7\] of torch.int64"):
        draft_vocab_probs(logits, ids[0, :3], 7, kept)


@pytest.mark.parametrize("width", [0, 1, 8, 1025, 32000])
def test_launch_config(width):
    config = _launch_config(width)
    assert 1 <= config.BLOCK_A <= 1024
    assert 1 <= config.num_warps <= 8
