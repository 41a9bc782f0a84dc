"""What a row keeps after temperature, top-k, top-p and min-p, against a sort.

Regimes: every set of filters, on and off by their values in one batch; ties at each boundary, kept
from the lowest id; k of 1, of the vocabulary and beyond; p at an exact share, so small that only
one stays, and after top-k; min-p above the top-p boundary; greedy rows; a long tail of equal logits
that is most of the mass; -0 and 0; -inf; rows of NaN, of inf, of nothing; widths off the block;
layouts, rows beyond 2^31 elements; compilation; bad arguments.
"""

import itertools
from dataclasses import replace
from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerie.kernels import row_filter as module
from aerie.kernels.row_filter import (
    MAX_SHARES,
    MAX_VOCABULARY,
    _launch_config,
    _row_filter_op,
    row_filter,
    row_filter_ref,
)
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
    same_bits,
    vast,
)

# one row each, in one batch: off, k, p, both, greedy
TEMPERATURE, TOP_K = [1.0, 0.7, 1.5, 0.3, 0.0], [0, 5, 1000, 40, 7]
TOP_P, MIN_P = [1.0, 2.0, 0.8, 0.6, 0.5], [0.0, 0.3, 0.05, 0.01, 0.9]
FILTERS = list(itertools.product([False, True], repeat=3))
REAL = on_gpu((5, 202048), (5, 32000))


def _settings(device, has_k=True, has_p=True, has_min=True):
    return (
        torch.tensor(TEMPERATURE, device=device),
        torch.tensor(TOP_K, device=device) if has_k else None,
        torch.tensor(TOP_P, device=device) if has_p else None,
        torch.tensor(MIN_P, device=device) if has_min else None,
    )


def _kept(logits, row_filter):
    """[T, V] bool from the description of the last member."""
    logits, ids = logits.float(), torch.arange(logits.shape[1], device=logits.device)
    threshold, last_id = row_filter.threshold_T[:, None], row_filter.last_id_T[:, None]
    return (logits > threshold) | ((logits == threshold) & (ids <= last_id))


def _kept_ids(op, logits, temperature=1.0, k=None, p=None, min_p=None):
    """Ids kept of one row."""
    logits = torch.as_tensor(logits, dtype=torch.float32)[None]
    one = [None if x is None else torch.tensor([x]) for x in (temperature, k, p, min_p)]
    return _kept(logits, op(logits, *one))[0].nonzero()[:, 0].tolist()


def _check(logits, *settings):
    actual, eager = run_guarded(row_filter, logits, *settings), row_filter_ref(logits, *settings)
    truth = exact(row_filter_ref, logits, *settings)
    assert torch.equal(_kept(logits, actual), _kept(logits, eager))
    assert_as_accurate(actual.log_mass_T, truth.log_mass_T, eager.log_mass_T)
    for name in ("maximum_T", "scale_T", "threshold_T"):
        assert same_bits(getattr(actual, name), getattr(eager, name)), name


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_matches_sort(filters, device, dtypes):
    for dtype in dtypes:
        _check(normal((5, 150), dtype, device) * 2, *_settings(device, *filters))


@pytest.mark.parametrize("shape", [(5, 1025), (5, 1), *REAL], ids=str)
def test_widths_around_the_block(shape, device):
    _check(normal(shape, torch.float16, device) * 2, *_settings(device))


@few_examples
@given(edges(64, 130), st.integers(1, 9), layouts())
def test_any_shape_and_layout(device, vocabulary, k, layout):
    logits = normal((2, vocabulary), torch.float16, device).mul(2).round()  # full of ties
    ones, ks = torch.ones(2, device=device), torch.tensor([k, 2 * k], device=device)
    actual = row_filter(laid_out(logits, layout), ones, ks)
    kept = _kept(logits, actual)
    assert torch.equal(kept, _kept(logits, row_filter_ref(logits, ones, ks)))
    assert kept.sum(dim=1).tolist() == [min(k, vocabulary), min(2 * k, vocabulary)]


@pytest.mark.parametrize("op", [row_filter, row_filter_ref])
def test_ties_are_kept_from_the_lowest_id(op):
    logits = [0.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    assert _kept_ids(op, logits, k=3) == [1, 2, 3]
    assert _kept_ids(op, [1.0, 1.0, 1.0, 1.0], p=0.5) == [0, 1]
    assert _kept_ids(op, [1.0, 1.0, 1.0, 1.0], p=0.51) == [0, 1, 2]
    assert _kept_ids(op, [-0.0, 0.0, -1.0, 0.0], k=2) == [0, 1]
    assert _kept_ids(op, [-3.0, -1.0, -1.0, -2.0], k=2) == [1, 2]


@pytest.mark.parametrize("op", [row_filter, row_filter_ref])
def test_order_of_the_filters(op):
    """Masses 8, 4, 2, 1, 1 of 16: top-p counts what top-k leaves, min-p compares with the best."""
    logits = [log(8), log(4), log(2), 0.0, 0.0]
    assert _kept_ids(op, logits, p=0.7) == [0, 1]
    assert _kept_ids(op, logits, p=0.8) == [0, 1, 2]
    assert _kept_ids(op, logits, k=2, p=0.66) == [0]  # 8 / 12, where 8 / 16 would keep two
    assert _kept_ids(op, logits, min_p=0.2) == [0, 1, 2]
    assert _kept_ids(op, logits, p=0.7, min_p=0.2) == [0, 1]
    assert _kept_ids(op, logits, p=0.95, min_p=0.4) == [0, 1]
    assert _kept_ids(op, logits, temperature=0.5, p=0.7) == [0]  # masses 64, 16, 4, 1, 1
    assert _kept_ids(op, logits, p=0.0) == _kept_ids(op, logits, min_p=2.0) == [0]


@pytest.mark.parametrize("op", [row_filter, row_filter_ref])
def test_greedy_is_the_lowest_argmax(op):
    for settings in ({}, {"k": 3}, {"p": 0.9}, {"k": 2, "p": 0.99, "min_p": 0.0}):
        assert _kept_ids(op, [1.0, 5.0, 5.0], temperature=0.0, **settings) == [1]


@pytest.mark.parametrize("op", [row_filter, row_filter_ref])
def test_a_long_tail_counts(op):
    """4000 ids of exp(-7) hold 3.6 times the mass of the best: half of all lies inside the tail."""
    logits = torch.full((4001,), -7.0)
    logits[3] = 0.0
    kept = _kept_ids(op, logits, p=0.5)
    assert 3 in kept
    needed = (0.5 * (1 + 4000 * torch.tensor(-7.0).double().exp()) - 1) / torch.exp(
        torch.tensor(-7.0).double()
    )
    assert len(kept) == 1 + int(needed.ceil())


def test_minus_infinity_is_legal(device):
    logits = torch.full((2, 70), -torch.inf, device=device)
    logits[0, 69], logits[1, 3:5] = 1.0, -4.0
    ones = torch.ones(2, device=device)
    for options in ({}, {"top_k_T": torch.tensor([9, 9], device=device)}, {"top_p_T": ones * 0.99}):
        actual = row_filter(logits, ones, **options)
        kept = _kept(logits, actual) & (logits > -torch.inf)
        assert kept.sum(dim=1).tolist() == [1, 2]
        assert actual.log_mass_T.tolist() == pytest.approx([0.0, log(2)])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and inf
def test_rows_that_are_not_legal(device):
    logits, settings = normal((5, 100), torch.float16, device), _settings(device)
    check_rows_apart(lambda x: row_filter(x, *settings), logits, 2)
    logits[0, 7], logits[1, 9], logits[3] = torch.nan, torch.inf, -torch.inf
    for op in (row_filter, row_filter_ref):
        expected = [True, True, False, True, False]
        assert op(logits, *settings).maximum_T.isnan().tolist() == expected


def test_row_beyond_32_bit_offsets(device):
    logits = vast(100, torch.float16, device).as_strided((3, 70), (VAST // 2, 1))
    logits[2, 41] = 2.0
    actual = row_filter(logits, torch.zeros(3, device=device))
    assert actual.last_id_T.tolist() == [0, 0, 41]


def test_no_rows(device):
    none = torch.ones(0, device=device)
    assert row_filter(torch.ones(0, 9, device=device), none).maximum_T.shape == (0,)


def test_compiles_once_for_all_row_counts(device):
    logits, settings = (
        normal((3, 40), torch.float16, device),
        [x[:3] for x in _settings(device) if x is not None],
    )
    check_compiles(row_filter, logits[:2], *[x[:2] for x in settings], again=(logits, *settings))


def test_opcheck(device):
    logits, settings = (
        normal((2, 40), torch.float16, device),
        [x[:2] for x in _settings(device) if x is not None],
    )
    torch.library.opcheck(_row_filter_op, (logits, *settings))
    torch.library.opcheck(_row_filter_op, (logits, settings[0], None, None, None))


def test_rejects_bad_arguments(device):
    logits, ones = torch.randn(2, 16, device=device), torch.ones(2, device=device)
    too_wide = torch.zeros(1, 1, device=device).expand(1, MAX_VOCABULARY + 1)
    for bad in (logits[0], logits.t(), logits[:, :0], logits.double(), too_wide):
        with pytest.raises(ValueError, match="logits_TV: must be float32, float16 or bfloat16"):
            row_filter(bad, ones)
    with pytest.raises(ValueError, match=r"temperature_T: must be a contiguous \[2\]"):
        row_filter(logits, ones[:1])
    with pytest.raises(ValueError, match=r"top_k_T: must be a contiguous \[2\] of torch.int64"):
        row_filter(logits, ones, top_k_T=ones)
    with pytest.raises(ValueError, match=r"top_p_T: must be a contiguous \[2\]"):
        row_filter(logits, ones, top_p_T=ones.half())
    with pytest.raises(ValueError, match=r"min_p_T: must be a contiguous \[2\]"):
        row_filter(logits, ones, min_p_T=ones[:1].expand(2))


@pytest.mark.parametrize("rows", [1, 5, 64, 4096])
@pytest.mark.parametrize("vocabulary", [1, 63, 4096, 202048, MAX_VOCABULARY])
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("float16", 19), ("float32", 32)])
def test_launch_config(rows, vocabulary, dtype, bits):
    config = _launch_config(rows, vocabulary, getattr(torch, dtype))
    assert config.SHIFT + bits == 32
    assert bits <= config.DIGIT * config.LEVELS
    assert 1 <= config.SHARES <= MAX_SHARES
    assert config.SHARES * config.size >= vocabulary > (config.SHARES - 1) * config.size
    assert config.size % max(config.SEARCH_V, config.BLOCK_V) == 0


def test_no_boundary_depends_on_how_a_row_is_cut(device, monkeypatch):
    logits, settings = (normal((5, 160), torch.float16, device) * 2).round(), _settings(device)
    expected = row_filter(logits, *settings)
    config = _launch_config(5, 160, torch.float16)
    cut = replace(config, SHARES=3, size=64, BLOCK_V=64)
    monkeypatch.setattr(module, "_launch_config", lambda *_: cut)
    actual = run_guarded(row_filter, logits, *settings)
    for name in ("maximum_T", "scale_T", "threshold_T", "last_id_T", "log_mass_T"):
        assert same_bits(getattr(actual, name), getattr(expected, name)), name
