"""FP8 rows: codes and scales bit by bit those of PyTorch, in the interpreter too.

Regimes: every code and both neighbours of every rounding boundary; widths off a group and across
several; one scale per row, per group and static; rows of zeros, subnormals, NaN and infinity; odd
layouts; no rows; bad arguments.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given

from aerie.kernels.quantize import (
    FP8,
    GROUP,
    LARGEST,
    _launch_config,
    _quantize_op,
    dequantized,
    e4m3_codes,
    quantize,
    quantize_ref,
)
from tests.evidence import (
    check_compiles,
    check_rows_apart,
    edges,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
)

MODES = [(False, None), (True, None), (False, 0.037)]
MODE_NAMES = ["row", "group", "static"]


@triton.jit
def _codes_of_kernel(x_ptr, codes_ptr, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes = e4m3_codes(tl.load(x_ptr + n, mask=n < N, other=0.0))
    tl.store(codes_ptr + n, codes, mask=n < N)


def static_scale(value: float | None, device) -> torch.Tensor | None:
    return None if value is None else torch.tensor([value], device=device)


def same(a, b) -> bool:
    return same_bits(a.codes_TD, b.codes_TD) and same_bits(a.scales_TN, b.scales_TN)


def test_every_code_and_every_boundary(device):
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    values = codes[codes.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    above, below = (torch.nextafter(middle, torch.tensor(s * torch.inf)) for s in (1, -1))
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 464.0, 1e30, 1e-30, -1e-45])
    many = normal([4096], torch.float32, "cpu") * 2.0 ** (normal([4096], torch.float32, "cpu") * 5)
    x = torch.cat((codes, middle, above, below, odd, many)).to(device)
    actual = torch.empty(len(x), dtype=torch.uint8, device=device)
    _codes_of_kernel[(triton.cdiv(len(x), 1024),)](x, actual, len(x), BLOCK=1024)
    expected = x.clamp(-LARGEST, LARGEST).to(FP8).view(torch.uint8)
    assert torch.equal(actual, expected), x[actual != expected]


@pytest.mark.parametrize("mode", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("shape", [(3, 300), *on_gpu((64, 5120), (7, 8192))], ids=str)
def test_bits_of_the_reference(shape, mode, device, dtypes):
    grouped, value = mode
    scale = static_scale(value, device)
    for dtype in dtypes:
        x = normal(shape, dtype, device) * 20
        actual = run_guarded(quantize, x, grouped, scale)
        assert same(actual, quantize_ref(x, grouped, scale))
        assert actual.scales_TN.shape == (shape[0], -(-shape[1] // GROUP) if grouped else 1)


@few_examples
@given(edges(2, 3), edges(128, 260), layouts())
def test_any_shape_and_layout(device, rows, width, layout):
    x = laid_out(normal((rows, width), torch.float16, device, width), layout)
    for grouped in (False, True):
        assert same(run_guarded(quantize, x, grouped, runs=1), quantize_ref(x, grouped))


@pytest.mark.parametrize("grouped", [False, True], ids=["row", "group"])
def test_error_is_half_a_step(grouped, device):
    x = normal((4, 300), torch.float32, device)
    q = quantize_ref(x.double(), grouped)
    step = torch.maximum(x.abs().double() / 16, q.scales_TN.max() * 2.0**-10)  # 3 bits; subnormals
    assert ((dequantized(q) - x).abs() <= step * 1.0001).all()


@pytest.mark.parametrize("apply", [quantize, quantize_ref], ids=["triton", "eager"])
@pytest.mark.parametrize("grouped", [False, True], ids=["row", "group"])
def test_strange_rows(apply, grouped, device):
    x = normal((6, 200), torch.float32, device)
    x[1], x[2], x[3, 7], x[4, 150], x[5] = 0.0, 1e-42, torch.nan, torch.inf, 3e38
    values = dequantized(apply(x, grouped))
    assert (values[1] == 0).all()
    assert values[2].abs().max() < 1e-30
    assert torch.equal(values[3].isnan(), torch.arange(200, device=device) == 7)
    assert values[4].isnan().any()
    assert values[4, :128].isfinite().all() == grouped
    assert ((values[5] - x[5]).abs() <= x[5] / 1e6).all()
    check_rows_apart(lambda rows: apply(rows, grouped), x[:1].expand(3, 200), 1)


@pytest.mark.parametrize("apply", [quantize, quantize_ref], ids=["triton", "eager"])
def test_static_scale_clamps(apply, device):
    x = torch.tensor([[1.0, 448.0, 449.0, -1e9]], device=device)
    q = apply(x, False, static_scale(1.0, device))
    assert q.codes_TD.float().tolist() == [[1.0, 448.0, 448.0, -448.0]]


def test_no_rows(device):
    assert quantize(torch.empty(0, 40, device=device)).codes_TD.shape == (0, 40)


def test_compiles_once_for_all_row_counts(device):
    two, three = (normal((rows, 200), torch.float32, device) for rows in (2, 3))
    check_compiles(quantize, two, True, again=(three, True))


def test_opcheck(device):
    x = normal((2, 200), torch.float32, device)
    for grouped, value in MODES:
        torch.library.opcheck(_quantize_op, (x, grouped, static_scale(value, device)))


def test_rejects_bad_arguments(device):
    x = normal((2, 40), torch.float32, device)
    with pytest.raises(ValueError, match=r"x_TD: must be \[T, D\]"):
        quantize(x[0])
    with pytest.raises(ValueError, match=r"x_TD: must be \[T, D\] with 1 to 65536 contiguous"):
        quantize(x.t())
    with pytest.raises(ValueError, match="x_TD: must be float32, float16 or bfloat16"):
        quantize(x.double())
    with pytest.raises(ValueError, match=r"scale: must be float32 \[1\]"):
        quantize(x, scale=torch.ones(2))


def test_launch_config():
    for width in (1, 128, 129, 5120, 8192, 65536):
        config = _launch_config(width)
        columns = config.BLOCK_G * GROUP
        assert columns >= width
        assert columns // (32 * config.num_warps) <= 128  # elements of a thread
