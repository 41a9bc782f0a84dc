"""Packed q/k/v projection of embedding and hidden against its reference.

Regimes: widths off the tile in all directions, one row, rows past one tile, bias, FP8, the order of
the halves and of their gains, repeated and out-of-range ids (a row of NaN, no read), int32-sized
table offsets, all depth in one program and several splits, strided rows, no rows, special values in
one row, guards and bits, the compiler, bad arguments, the launch rule.
"""

from typing import Any

import pytest
import torch

from aerie.kernels import stream_launch
from aerie.kernels.qkv_projection import (
    _launch_config,
    _qkv_projection_op,
    qkv_projection,
    qkv_projection_ref,
)
from aerie.kernels.target import HOPPER
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    exact,
    laid_out,
    normal,
    on_gpu,
    run_guarded,
    vast,
)

FP8, EPS = torch.float8_e4m3fn, 1e-5
CASES = [(1, 1, 1), (3, 70, 66), (17, 130, 20), (70, 16, 33)]  # rows, width of a half, output width
REAL = on_gpu((1, 5120, 7168), (16, 5120, 7168), (64, 5120, 7168))


def _inputs(case, dtype, device, fp8=False, bias=False):
    rows, width, width_out = case
    ids = torch.randint(0, 9, (rows,), device=device)
    table, hidden = normal((9, width), dtype, device, 1), normal((rows, width), dtype, device, 2)
    gains = [normal((width,), dtype, device, seed).abs() + 0.5 for seed in (3, 4)]
    weight = normal((width_out, 2 * width), dtype, device, 5)
    scale = normal((width_out,), torch.float32, device, 6).abs() + 0.1
    codes = (weight.to(FP8), scale) if fp8 else (weight, None)
    return (
        ids,
        table,
        hidden,
        *gains,
        EPS,
        *codes,
        normal((width_out,), dtype, device, 7) if bias else None,
    )


@pytest.fixture
def splits(monkeypatch):
    """Sets the number of programs per tile, as another width would."""
    return lambda n: monkeypatch.setattr(stream_launch, "_splits", lambda *_: n)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_ref(case, fp8, device, dtypes):
    for dtype in dtypes:
        arguments = _inputs(case, dtype, device, fp8, bias=case[0] > 1)
        truth = exact(qkv_projection_ref, *arguments)
        assert_as_accurate(qkv_projection(*arguments), truth, qkv_projection_ref(*arguments))


@pytest.mark.parametrize("programs", [1, 2, 6])
def test_any_split_of_the_depth(programs, splits, device):
    splits(programs)  # both halves, one half each, a third of a half each
    arguments = _inputs((3, 300, 20), torch.float16, device, True)
    actual = run_guarded(qkv_projection, *arguments)
    truth = exact(qkv_projection_ref, *arguments)
    assert_as_accurate(actual, truth, qkv_projection_ref(*arguments))


def test_every_half_meets_its_columns_and_gain(device):
    table, hidden = torch.eye(3, 4, device=device), torch.ones(2, 4, device=device)
    ids, gains = torch.tensor([2, 0], device=device), (torch.arange(4.0) + 1, torch.arange(4.0) + 5)
    gains = [gain.to(device) for gain in gains]
    y = qkv_projection(ids, table, hidden, *gains, 1e-9, torch.eye(8, device=device))
    expected = [[0, 0, 6, 0, 5, 6, 7, 8], [2, 0, 0, 0, 5, 6, 7, 8]]  # one of four: RMS 1 / 2
    torch.testing.assert_close(y, torch.tensor(expected, device=device).float())


@pytest.mark.parametrize("programs", [1, 2])
def test_id_out_of_range_is_a_row_of_nan(programs, splits, device):
    splits(programs)
    ids, table, *others = _inputs((5, 40, 20), torch.float32, device)
    inner = laid_out(table, "row steps")  # what an id outside would read is NaN or not there
    clean = qkv_projection(ids, inner, *others)
    ids[1], ids[2], ids[4] = -1, 9, 2**62
    y = qkv_projection(ids, inner, *others)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert y[[1, 2, 4]].isnan().all()


def test_offsets_are_64_bit(device):
    table = vast(16, torch.float16, device).view(-1, 16)  # its last row begins at element 2^31
    _, _, hidden, *others = _inputs((1, 16, 8), torch.float16, device)
    table[-1] = hidden[0]
    last = torch.tensor([table.shape[0] - 1], device=device)
    expected = qkv_projection(last * 0, hidden, hidden, *others)
    assert torch.equal(qkv_projection(last, table, hidden, *others), expected)


@pytest.mark.parametrize("layout", ["offset", "columns", "row steps"])
def test_layouts(layout, device):
    ids, table, hidden, g, h, eps, weight, *others = _inputs((3, 40, 20), torch.float32, device)
    expected = qkv_projection(ids, table, hidden, g, h, eps, weight)
    table, hidden, weight = (laid_out(x, layout) for x in (table, hidden, weight))
    assert torch.equal(qkv_projection(ids, table, hidden, g, h, eps, weight), expected)


def test_no_rows(device):
    assert qkv_projection(*_inputs((0, 16, 24), torch.float32, device)).shape == (0, 24)


@pytest.mark.parametrize("fp8", [False, True])
def test_special_values_stay_in_their_row(fp8, device):
    ids, table, hidden, *others = _inputs((3, 40, 20), torch.float16, device, fp8)
    check_rows_apart(lambda x: qkv_projection(ids, table, x, *others), hidden, 1)
    ids = torch.tensor([1, 7, 2], device=device)
    check_rows_apart(
        lambda x: qkv_projection(ids, x, hidden, *others)[[0, 2]].repeat(5, 1)[:9], table, 7
    )


def test_opcheck_and_compile(device):
    arguments = _inputs((2, 16, 24), torch.float32, device, bias=True)
    torch.library.opcheck(_qkv_projection_op, arguments)
    ids, table, hidden, *others = arguments
    again = (torch.cat([ids, ids]), table, torch.cat([hidden, hidden]), *others)
    check_compiles(qkv_projection, *arguments, again=again)


def test_rejects_bad_arguments(device):
    names = ("ids_T", "table_VD", "hidden_TD", "embed_weight_D", "hidden_weight_D", "eps")
    good: dict[str, Any] = dict(
        zip(
            (*names, "weight_F2D", "scale_F", "bias_F"),
            _inputs((2, 16, 24), torch.float32, device, bias=True),
            strict=True,
        )
    )
    rejected = [
        (r"ids_T: must be a contiguous int64 \[2\]", {"ids_T": good["ids_T"].int()}),
        (r"ids_T: must be a contiguous int64 \[2\]", {"ids_T": good["ids_T"][:1]}),
        ("table_VD: must be float32", {"table_VD": good["table_VD"][0]}),
        (r"table_VD: must be \[V, 16\]", {"table_VD": good["table_VD"][:, :8]}),
        (r"table_VD: must be \[V, 16\] torch.float32", {"table_VD": good["table_VD"].half()}),
        (r"table_VD: must be .* V > 0", {"table_VD": good["table_VD"][:0]}),
        ("table_VD: must be on", {"table_VD": good["table_VD"].to("meta")}),
        ("hidden_TD: must be float32", {"hidden_TD": good["hidden_TD"].double()}),
        (r"embed_weight_D: .*\[16\]", {"embed_weight_D": good["embed_weight_D"][:8]}),
        (r"hidden_weight_D: .*\[16\]", {"hidden_weight_D": good["hidden_weight_D"][:8]}),
        (r"weight_F2D: must be \[F, 32\]", {"weight_F2D": good["weight_F2D"][:, :16]}),
        ("weight_F2D: must be torch.float32", {"weight_F2D": good["weight_F2D"].half()}),
        ("scale_F: must be given with FP8", {"weight_F2D": good["weight_F2D"].to(FP8)}),
        (r"bias_F: must be a contiguous \[24\]", {"bias_F": good["bias_F"][:7]}),
    ]
    for message, change in rejected:
        with pytest.raises(ValueError, match=message):
            qkv_projection(**{**good, **change})


@pytest.mark.parametrize(("itemsize", "weight_itemsize"), [(2, 2), (2, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 1000])
def test_launch_config(rows, itemsize, weight_itemsize):
    config = _launch_config(HOPPER, rows, 7168, 5120, itemsize, weight_itemsize)
    stage = (config.BLOCK_F * weight_itemsize + config.BLOCK_T * itemsize) * config.BLOCK_D
    assert config.num_stages * stage <= 99 * 1024
    assert rows > 64 or (config.PARTS, config.SPLIT) == (1, True)  # 2 x 112 programs
