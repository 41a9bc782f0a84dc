"""Gate and up projection with SwiGLU against its reference.

Regimes: widths off the tile in all directions (half a tile of gate and up rows too), one row, rows
past one tile and past 64, FP8 with both kinds of scale, gate and up not exchanged, where gate, up
and silu round, large gates, one split and several, strided and expanded operands, no rows, special
values in one row, guards and bits, the compiler, bad arguments, the launch rule.
"""

import pytest
import torch

from aerie.kernels import stream_launch
from aerie.kernels.gate_up import _gate_up_op, _launch_config, gate_up, gate_up_ref
from aerie.kernels.swiglu import swiglu_ref
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
)

FP8 = torch.float8_e4m3fn
# rows, depth, width: 31, 32 and 33 columns end around a tile of 64 weight rows
CASES = [(1, 1, 1), (3, 100, 31), (5, 130, 33), (16, 64, 32), (70, 40, 66)]
REAL = on_gpu((1, 5120, 8192), (16, 5120, 8192), (64, 5120, 32768), (300, 5120, 8192))


def _inputs(case, dtype, device, fp8=None):
    rows, depth, width = case
    x, weight = (
        normal((rows, depth), dtype, device, 1),
        normal((2 * width, depth), dtype, device, 2),
    )
    if fp8 is None:
        return x, weight, None
    sizes = {"channel": 2 * width, "tensor": 1}
    return x, weight.to(FP8), normal((sizes[fp8],), torch.float32, device, 3).abs() + 0.1


def _call(x, weight, scale):
    return gate_up(x, weight, scale=scale)


def _ref(x, weight, scale):
    return gate_up_ref(x, weight, scale=scale)


@pytest.fixture
def splits(monkeypatch):
    """Sets the number of shares of the depth, as another width would."""
    return lambda n: monkeypatch.setattr(stream_launch, "_splits", lambda *_: n)


@pytest.mark.parametrize("fp8", [None, "channel", "tensor"])
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_ref(case, fp8, device, dtypes):
    for dtype in dtypes:
        arguments = _inputs(case, dtype, device, fp8)
        assert_as_accurate(_call(*arguments), exact(_ref, *arguments), _ref(*arguments))


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_any_split_of_the_depth(shares, splits, device):
    splits(shares)
    arguments = _inputs((3, 300, 33), torch.float16, device, "channel")
    actual = run_guarded(_call, *arguments)
    assert_as_accurate(actual, exact(_ref, *arguments), _ref(*arguments))


def test_gate_and_up_meet_their_rows(device):
    width = 40
    weight = torch.zeros(2 * width, 2 * width, device=device)
    weight.fill_diagonal_(1.0)  # gate reads the first half of x, up the second
    x = normal((2, 2 * width), torch.float32, device)
    y = gate_up(x, weight)
    torch.testing.assert_close(y, swiglu_ref(x[:, :width], x[:, width:]))


def test_rounds_as_separate_operations(device):
    """A diagonal weight makes gate and up one product each, exact in float32, that must round."""
    x, factor = normal((3, 64), torch.float16, device), 1.0 + 2.0**-10
    weight = torch.eye(64, device=device).half() * factor
    gate, up = (x.float() * factor).half().float().chunk(2, dim=-1)
    silu = (gate / (1.0 + torch.exp(-gate))).half().float()
    difference = gate_up(x, weight).float() - (silu * up).half().float()
    assert (difference != 0).float().mean() < 0.05  # exp differs in its last bit between libraries


def test_large_gates(device):
    x = torch.tensor([[1000.0], [-1000.0], [0.0]], device=device)
    y = gate_up(x, torch.ones(2, 1, device=device))
    assert y.flatten().tolist() == [1e6, 0.0, 0.0]


@pytest.mark.parametrize("layout", ["offset", "columns", "row steps"])
def test_layouts(layout, device):
    x, weight, _ = _inputs((3, 40, 20), torch.float16, device)
    expected = gate_up(x, weight)
    assert torch.equal(gate_up(laid_out(x, layout), laid_out(weight, layout)), expected)


def test_expanded_rows(device):
    x, weight, _ = _inputs((1, 40, 20), torch.float32, device)
    assert torch.equal(gate_up(x.expand(3, 40), weight), gate_up(x, weight).expand(3, 20))


@pytest.mark.parametrize("shape", [(0, 16, 24), (2, 16, 0)])
def test_no_rows(shape, device):
    assert gate_up(*_inputs(shape, torch.float32, device)[:2]).shape == (shape[0], shape[2])


@pytest.mark.parametrize("fp8", [None, "channel"])
def test_special_values_stay_in_their_row(fp8, device):
    x, weight, scale = _inputs((3, 40, 20), torch.float16, device, fp8)
    check_rows_apart(lambda rows: _call(rows, weight, scale), x, 1)


def test_opcheck_and_compile(device):
    x, weight, _ = _inputs((2, 16, 24), torch.float32, device)
    torch.library.opcheck(_gate_up_op, (x, weight, None))
    check_compiles(gate_up, x, weight, again=(torch.cat([x, x]), weight))


def test_rejects_bad_arguments(device):
    x, weight, _ = _inputs((2, 16, 8), torch.float32, device)
    scale = torch.ones(16, device=device)
    rejected = [
        ("x_TD: must be float32", x[0], weight, None),
        ("x_TD: must be float32", x.double(), weight.double(), None),
        (r"weight_F2D: must be \[F, 16\]", x, weight[:, :8], None),
        ("weight_F2D: must have 2 [*] F rows", x, weight[:15], None),
        ("weight_F2D: must be torch.float32", x, weight.half(), None),
        ("weight_F2D: must be on", x, weight.to("meta"), None),
        ("scale: must be given with FP8", x, weight.to(FP8), None),
        ("scale: must be given with FP8", x, weight, scale),
        (r"scale: must be a contiguous \[16\] or \[1\]", x, weight.to(FP8), scale[:8]),
    ]
    for message, *arguments in rejected:
        with pytest.raises(ValueError, match=message):
            _call(*arguments)


@pytest.mark.parametrize(("itemsize", "weight_itemsize"), [(2, 2), (2, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 1000])
def test_launch_config(rows, itemsize, weight_itemsize):
    config = _launch_config(HOPPER, rows, 8192, 5120, itemsize, weight_itemsize)
    stage = (config.BLOCK_F * weight_itemsize + config.BLOCK_T * itemsize) * config.BLOCK_D
    assert config.num_stages * stage <= 99 * 1024
    assert config.PARTS == 1  # 256 programs without a split
