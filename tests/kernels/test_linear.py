"""Linear layer against its reference.

Regimes: every dimension off its tile and at its edges, one row, more rows than a tile, the 128-wide
tile, no rows, bias, FP8 weights with a scale per channel and per tensor, activations that float16
cannot hold, one split and several (an empty one too), counters that reset, strided and expanded
operands, NaN and infinity in one row, guards, bits, the compiler, bad arguments, launch rule.
"""

import pytest
import torch
import triton
import triton.language as tl

from aerie.kernels import stream_launch
from aerie.kernels.linear import Linear, _launch_config, _linear_op, linear, linear_ref
from aerie.kernels.quantize import quantize_ref
from aerie.kernels.scaled_linear import scaled_linear_ref
from aerie.kernels.target import HOPPER
from aerie.kernels.weight_stream import column_scales
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
# rows, depth, width: the last is wider than 64 rows, where 16-bit tiles are 128 x 128
CASES = [(1, 1, 1), (3, 100, 63), (5, 257, 65), (16, 128, 64), (17, 127, 64), (70, 65, 130)]
REAL = on_gpu((1, 5120, 7168), (64, 5120, 5120), (5, 8192, 5120), (1000, 5120, 7168))


def _inputs(case, dtype, device, fp8=None):
    rows, depth, width = case
    x, weight = normal((rows, depth), dtype, device, 1), normal((width, depth), dtype, device, 2)
    bias = normal((width,), dtype, device, 3)
    if fp8 is None:
        return x, weight, bias, None
    sizes = {"channel": width, "tensor": 1}
    return x, weight.to(FP8), bias, torch.rand(sizes[fp8], device=device) + 0.1


@pytest.fixture
def splits(monkeypatch):
    """Sets the number of shares of the depth, as another width would."""
    return lambda n: monkeypatch.setattr(stream_launch, "_splits", lambda *_: n)


@pytest.mark.parametrize("fp8", [None, "channel", "tensor"])
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_ref(case, fp8, device, dtypes):
    for dtype in dtypes:
        x, weight, bias, scale = _inputs(case, dtype, device, fp8)
        for b in (None, bias):
            truth = exact(linear_ref, x, weight, b, scale)
            eager = linear_ref(x, weight, b, scale)
            assert_as_accurate(linear(x, weight, b, scale), truth, eager)


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
def test_any_split_of_the_depth(shares, splits, device, dtypes):
    splits(shares)  # 390 columns are four steps in float16: five shares leave one empty
    for dtype in dtypes:
        arguments = _inputs((3, 390, 60), dtype, device, "channel")
        actual = run_guarded(linear, *arguments)  # a counter that stays would show
        assert_as_accurate(actual, exact(linear_ref, *arguments), linear_ref(*arguments))


def test_counters_are_kept_but_not_by_a_capture(monkeypatch):
    """On the CPU no graph is captured: what would be on a GPU is told to `split_scratch`."""
    config = _launch_config(HOPPER, 1, 5120, 5120, 2, 2)

    class OnGpu:
        is_cuda, device = True, torch.device("cpu")

        def new_empty(self, size, dtype):
            return torch.empty(size, dtype=dtype)

    def counters(is_captured):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_captured)
        return stream_launch.split_scratch(OnGpu(), config, (1, 80, 3))[1].data_ptr()

    stream = type("Stream", (), {"cuda_stream": 7})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    first, own, other = counters(False), counters(True), counters(True)
    assert counters(False) == first
    assert own != first
    assert other != first


def test_no_rows(device):
    x, weight, bias, _ = _inputs((0, 16, 16), torch.float32, device)
    assert linear(x, weight, bias).shape == (0, 16)


@pytest.mark.parametrize("layout", ["offset", "columns", "row steps"])
def test_layouts(layout, device):
    x, weight, bias, _ = _inputs((4, 90, 30), torch.float16, device)
    expected = linear(x, weight, bias)
    assert torch.equal(linear(laid_out(x, layout), laid_out(weight, layout), bias), expected)


def test_expanded_rows(device):
    x, weight, _, _ = _inputs((1, 40, 20), torch.float32, device)
    x, weight = x.expand(3, 40), weight[:1].expand(20, 40)
    # not with one row times one weight: in a wider tile NumPy may sum in another order
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight.contiguous()))


def test_sum_is_float32(device):
    x = torch.full((1, 4096), 0.25, device=device).half()
    weight = torch.ones(1, 4096, device=device).half()  # a float16 sum would stall at 512
    assert linear(x, weight).item() == 1024.0


@triton.jit
def _column_scales_probe(x_ptr, down_ptr, up_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    down, up = column_scales(tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + column))
    tl.store(down_ptr + column, down)
    tl.store(up_ptr + column, up)


def test_column_scales_hold_any_magnitude(device):
    """The interpreter refuses the bfloat16 rows that need them, so the helper is probed alone."""
    exponents = torch.arange(-149, 128, device=device).double()
    largest = (2.0**exponents * 1.5).float()[:256]
    x = torch.stack([largest, -largest / 4])
    down, up = torch.empty_like(largest), torch.empty_like(largest)
    _column_scales_probe[(1,)](x, down, up, ROWS=2, COLUMNS=256)
    assert torch.equal(down.double() * up.double(), torch.ones_like(down).double())
    scaled = (largest * down)[largest > 2.0**-110]
    assert ((scaled >= 2.0**14) & (scaled < 2.0**15)).all()
    assert (largest * down < 2.0**15).all()
    special = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0], [1.0] * 4], device=device)
    _column_scales_probe[(1,)](special, down, up, ROWS=2, COLUMNS=4)
    assert (down[:4].isfinite() & up[:4].isfinite() & (down[:4] * up[:4] == 1.0)).all()


@pytest.mark.parametrize("fp8", [None, "channel"])
def test_special_values_stay_in_their_row(fp8, device):
    x, weight, bias, scale = _inputs((3, 40, 20), torch.float16, device, fp8)
    check_rows_apart(lambda rows: linear(rows, weight, bias, scale), x, 1)


@pytest.mark.parametrize("bias", [True, False])
def test_module_uses_its_parameters(bias, device):
    layer = Linear(24, 40, bias, "triton").to(device)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = normal((2, 24), torch.float32, device)
    assert torch.equal(layer(x), linear(x, layer.weight, layer.bias))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"][: 1 + bias]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("scales", ["channel", "block"])
def test_module_meets_codes(scales, backend, device):
    """Rows of prompts become codes as the weight's scales want them; others stay as they are."""
    x, weight, bias, scale = _inputs((5, 150, 40), torch.float32, device, "channel")
    assert scale is not None
    if scales == "block":
        scale = scale[:2].expand(1, 2).contiguous()
    layer = Linear(150, 40, True, backend).to(device)
    layer.hold_fp8(tuple(scale.shape))
    for name, given in (("weight", weight), ("bias", bias), ("weight_scale", scale)):
        layer.get_parameter(name).data.copy_(given)
    arguments = quantize_ref(x, scales == "block"), weight, scale, bias
    truth = exact(scaled_linear_ref, *arguments, torch.float64)
    actual = layer(x, quantises=True)
    assert_as_accurate(actual, truth, scaled_linear_ref(*arguments, torch.float32))
    as_it_is = layer(x)
    assert torch.equal(as_it_is, layer(x, quantises=False))
    assert 1e-3 < (actual - as_it_is).norm() / as_it_is.norm() < 0.1


def test_unquantised_module_never_meets_codes(device):
    layer = Linear(24, 40, True, "triton").to(device)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = normal((2, 24), torch.float32, device)
    assert layer.row_codes == "none"
    assert torch.equal(layer(x, quantises=True), layer(x))


def test_opcheck_and_compile(device):
    x, weight, bias, scale = _inputs((3, 48, 20), torch.float32, device, "channel")
    some = ("test_faketensor", "test_autograd_registration")  # PyTorch's others compute in FP8
    torch.library.opcheck(_linear_op, (x, weight, bias, scale), test_utils=some)
    torch.library.opcheck(_linear_op, (x[:, 16:], weight.float()[:, 16:], None, None))
    check_compiles(linear, x, weight, bias, scale, again=(torch.cat([x, x]), weight, bias, scale))


def test_rejects_bad_arguments(device):
    x, weight, bias, _ = _inputs((2, 16, 8), torch.float32, device)
    scale = torch.ones(8, device=device)
    rejected = [
        ("x_TD: must be float32", (x[0], weight)),
        ("x_TD: must be float32", (x.double(), weight.double())),
        ("x_TD: .*contiguous last dimension", (x.t(), weight)),
        ("weight_FD: .*contiguous last dimension", (x[:, :8], weight.t())),
        (r"weight_FD: must be \[F, 16\]", (x, weight[:, :8])),
        ("weight_FD: must be torch.float32", (x, weight.half())),
        (r"weight_FD: must be on .*got meta", (x, weight.to("meta"))),
        (r"bias_F: must be a contiguous \[8\]", (x, weight, bias[:7])),
        (r"bias_F: must be a contiguous \[8\]", (x, weight, bias.long())),
        ("scale_F: must be given with FP8", (x, weight.to(FP8))),
        ("scale_F: must be given with FP8", (x, weight, None, scale)),
        (
            r"scale_F: must be a contiguous \[8\] or \[1\] or \[1, 1\]",
            (x, weight.to(FP8), None, scale[:7]),
        ),
        (r"scale_F: .*of torch.float32", (x, weight.to(FP8), None, scale.half())),
    ]
    for message, arguments in rejected:
        with pytest.raises(ValueError, match=message):
            linear(*arguments)


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)

    class OnGpu:
        dtype, ndim, is_cuda, device, shape = FP8, 2, True, "cuda:0", (8, 16)

        def stride(self, dim=-1):
            return 1

    class Rows:
        dtype, device = torch.bfloat16, "cuda:0"

    class Scale(OnGpu):
        dtype, shape = torch.float32, (8,)

        def is_contiguous(self):
            return True

    with pytest.raises(ValueError, match=r"weight_FD: FP8 needs CUDA capability 8.9 .*\(8, 0\)"):
        stream_launch.check_weight("weight_FD", OnGpu(), 16, Rows(), Scale(), "scale_F")


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 33, 64, 65, 8192])
@pytest.mark.parametrize(("itemsize", "weight_itemsize"), [(2, 2), (2, 1), (4, 4), (4, 1)])
def test_launch_config(rows, itemsize, weight_itemsize):
    for features in (1, 64, 1024, 5120, 7168, 32000, 202048):
        config = _launch_config(HOPPER, rows, features, 5120, itemsize, weight_itemsize)
        assert min(config.BLOCK_F, config.BLOCK_T, config.BLOCK_D) >= 16  # the smallest tl.dot
        stage = (config.BLOCK_F * weight_itemsize + config.BLOCK_T * itemsize) * config.BLOCK_D
        assert config.num_stages * stage <= 99 * 1024  # two programs per SM; one where SMs have 99
        programs = -(-features // config.BLOCK_F) * -(-rows // config.BLOCK_T)
        assert (config.PARTS > 1) == config.SPLIT
        assert not config.SPLIT or programs <= 2 * stream_launch.SMS  # as many counters
        assert config.PARTS * config.BLOCK_D <= 5120


def test_splits_fill_the_gpu():
    assert _launch_config(HOPPER, 1, 5120, 5120, 2, 2).PARTS == 3  # 80 tiles
    assert _launch_config(HOPPER, 64, 7168, 5120, 2, 1).PARTS == 2  # 112 tiles
    assert _launch_config(HOPPER, 1, 32000, 5120, 2, 2).PARTS == 1
