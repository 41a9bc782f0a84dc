"""Argmax against its reference, exactly.

Regimes: one column, widths off a power of two, wider than a tile, Llama 4's vocabulary; ties within
a tile and across tiles, rows of equal values, masked ids, NaN, +inf or only -inf in
one row, strided and expanded rows, rows beyond 2^31 elements, no rows, writes outside the output,
unequal runs, bad arguments; rows cut into columns, put together from the keys.
"""

import pytest
import torch
from hypothesis import given

from aerie.kernels.argmax import (
    _argmax_op,
    _launch_config,
    argmax,
    argmax_keys,
    argmax_keys_ref,
    argmax_ref,
    chosen_ids,
)
from tests.evidence import (
    VAST,
    check_compiles,
    edges,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
    vast,
)

LLAMA_4_VOCABULARY = 202048
SHAPES = [(1, 1), (3, 63), (5, 1000), (2, 4095), (2, 4096), (2, 4097), (2, 9001), (0, 64)]
REAL = on_gpu((1, LLAMA_4_VOCABULARY), (64, LLAMA_4_VOCABULARY), (4096, 32000))


@pytest.mark.parametrize("shape", [*SHAPES, *REAL], ids=str)
def test_matches_ref(shape, device, dtypes):
    for dtype in dtypes:
        logits = torch.randn(shape, device=device).to(dtype)
        assert same_bits(run_guarded(argmax, logits), argmax_ref(logits))


@few_examples
@given(edges(4, 5), edges(64, 200), layouts())
def test_any_shape_and_layout(device, rows, vocabulary, layout):
    few_values = normal((rows, vocabulary), torch.float32, device).mul(2).round().half()
    logits = laid_out(few_values, layout)
    assert same_bits(run_guarded(argmax, logits), argmax_ref(few_values))


def test_row_beyond_32_bit_offsets(device):
    logits = vast(100, torch.float16, device).as_strided((3, 100), (VAST // 2, 1))
    logits[2, 41], logits[1, 40] = 2.0, 1.0
    assert argmax(logits).tolist() == [0, 40, 41]


@pytest.mark.parametrize("ids", [[7, 300], [0, 9000], [4095, 4096], [5, 4101, 8197]], ids=str)
def test_ties_go_to_the_lowest_id(ids, device):
    logits = torch.randn(2, 9001, device=device)
    logits[1, ids] = 50.0
    for op in (argmax, argmax_ref):
        assert op(logits)[1] == ids[0]


def test_equal_and_masked_rows(device):
    logits = torch.zeros(2, 5000, device=device)
    logits[1, :4999] = -torch.inf
    for op in (argmax, argmax_ref):
        assert op(logits).tolist() == [0, 4999]


@pytest.mark.parametrize("column", [0, 4096, 4999])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, None], ids=["NaN", "+inf", "all -inf"])
def test_illegal_row_is_minus_one_and_no_other(poison, column, device):
    logits = torch.randn(3, 5000, device=device)
    clean = argmax(logits)
    if poison is None:
        logits[1] = -torch.inf
    else:
        logits[1, 17], logits[1, column] = torch.inf, poison
    for op in (argmax, argmax_ref):
        assert op(logits).tolist() == [clean[0], -1, clean[2]]


@pytest.mark.parametrize("cuts", [[1], [2, 40, 63]], ids=str)
def test_keys_of_columns(cuts, device, dtypes):
    """Ties across a cut, NaN, +inf, -inf and negative zero in one of the parts."""
    for dtype in dtypes:
        logits = normal((9, 64), dtype, device).mul(2).round()
        logits[0, [1, 2, 63]], logits[1, 40], logits[2, 2] = 9.0, torch.nan, torch.inf
        logits[3], logits[4, :63], logits[5] = -torch.inf, -torch.inf, 0.0
        logits[5, :16], logits[6, 0], logits[7] = -0.0, -torch.nan, -3.0
        ends = [0, *cuts, 64]
        for op in (argmax_keys, argmax_keys_ref):
            parts = [op(logits[:, i:j], i) for i, j in zip(ends, ends[1:], strict=False)]
            assert same_bits(chosen_ids(torch.stack(parts).amax(0)), argmax_ref(logits))
        legal = logits[[4, 5, 7, 8]]
        assert same_bits(argmax_keys(legal, 7), argmax_keys_ref(legal, 7))


def test_llama_4_vocabulary(device):
    logits = torch.randn(1, LLAMA_4_VOCABULARY, device=device).half()
    logits[0, -1] = 100.0
    assert argmax(logits).tolist() == [LLAMA_4_VOCABULARY - 1]


def test_strided_rows(device):
    logits = torch.randn(3, 300, device=device)[:, 50:250]
    assert torch.equal(argmax(logits), argmax_ref(logits))


def test_expanded_rows(device):
    logits = torch.randn(1, 300, device=device)
    assert same_bits(argmax(logits.expand(3, 300)), argmax_ref(logits).expand(3))


def test_compiles_once_for_all_row_counts(device):
    logits = torch.randn(5, 48, device=device)
    check_compiles(argmax, logits[:2], again=(logits,))


def test_opcheck(device):
    torch.library.opcheck(_argmax_op, (torch.randn(3, 48, device=device),))
    torch.library.opcheck(_argmax_op, (torch.randn(3, 96, device=device)[:, 8:50],))


def test_rejects_bad_arguments(device):
    logits = torch.randn(4, 16, device=device)
    for bad in (logits[0], logits.t(), logits[:, :0]):
        with pytest.raises(ValueError, match=r"logits_TV: must be \[T, V\] with V > 0"):
            argmax(bad)
    with pytest.raises(ValueError, match="first: must be the id of the first column, got -1"):
        argmax_keys(logits, -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_rejects_dtypes_that_float32_does_not_hold(dtype, device):
    with pytest.raises(ValueError, match="logits_TV: must be float32, float16 or bfloat16"):
        argmax(torch.ones(2, 3, dtype=dtype, device=device))


@pytest.mark.parametrize("vocabulary", [1, 63, 4096, LLAMA_4_VOCABULARY])
def test_launch_config(vocabulary):
    config = _launch_config(vocabulary)
    assert min(vocabulary, 4096) <= config.BLOCK_V <= 4096
    assert 1 <= config.num_warps <= 16
