"""Aux projection against its reference.

Regimes: one to eight taps and their order, widths off the tile in all three directions, rows past
one tile, bias, residuals, the three norms, FP8 weights, rows of any magnitude, all depth in one
program, one program per tap and several per tap, slices of a capture buffer read in place, taps of
different strides, no rows, NaN and infinity in one row, guards and bits, the compiler, the module's
parameters, bad arguments.
"""

import pytest
import torch

from aerie.kernels import stream_launch
from aerie.kernels.aux_projection import (
    MAX_TAPS,
    AuxProjection,
    JointNorm,
    TapNorm,
    _aux_projection_op,
    _launch_config,
    _with_one_stride,
    aux_projection,
    aux_projection_ref,
)
from aerie.kernels.target import HOPPER
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    exact,
    normal,
    on_gpu,
    run_guarded,
)

FP8 = torch.float8_e4m3fn
NORMS = (None, "tap", "joint")
# taps, rows, width of a tap, output width
CASES = [(1, 1, 1, 1), (3, 5, 63, 66), (2, 17, 130, 33), (2, 70, 16, 16), (8, 3, 70, 20)]
REAL = on_gpu((3, 1, 5120, 5120), (3, 16, 5120, 5120), (3, 64, 5120, 5120), (3, 300, 5120, 5120))


def _inputs(case, device, dtype=torch.float32, norm=None, residual=False, fp8=False):
    """Taps, weight, bias, residuals, norm and scale, in the order that `_call` takes."""
    num_taps, rows, width, width_out = case
    taps = [normal((rows, width), dtype, device, i) for i in range(num_taps)]
    residuals = [normal((rows, width), dtype, device, 10 + i) for i in range(num_taps)]
    weight = normal((width_out, num_taps * width), dtype, device, 20)
    bias = normal((width_out,), dtype, device, 21)
    gain = normal((num_taps * width,), dtype, device, 22).abs() + 0.5
    norms = {"tap": TapNorm(gain.split(width), 1e-5), "joint": JointNorm(gain, 1e-5), None: None}
    scale = normal((width_out,), torch.float32, device, 23).abs() + 0.1
    codes = (weight.to(FP8), scale) if fp8 else (weight, None)
    return taps, codes[0], bias, residuals if residual else None, norms[norm], codes[1]


def _call(taps, weight, bias, residuals, norm, scale):
    return aux_projection(taps, weight, bias, residuals=residuals, norm=norm, scale_F=scale)


def _ref(taps, weight, bias, residuals, norm, scale):
    return aux_projection_ref(taps, weight, bias, residuals=residuals, norm=norm, scale_F=scale)


def _check(arguments):
    assert_as_accurate(_call(*arguments), exact(_ref, *arguments), _ref(*arguments))


@pytest.fixture
def splits(monkeypatch):
    """Sets the number of programs per tile, as another width would."""
    return lambda n: monkeypatch.setattr(stream_launch, "_splits", lambda *_: n)


@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_ref(case, device, dtypes):
    for dtype in dtypes:
        _check(_inputs(case, device, dtype))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_residuals(norm, residual, fp8, device, dtypes):
    for dtype in dtypes:
        _check(_inputs((3, 3, 70, 20), device, dtype, norm, residual, fp8))


@pytest.mark.parametrize("programs", [1, 2, 6])
@pytest.mark.parametrize("norm", NORMS)
def test_any_split_of_the_depth(programs, norm, splits, device):
    splits(programs)  # all of the depth, one tap each, a third of a tap each
    arguments = _inputs((2, 3, 300, 20), device, torch.float16, norm, True)
    actual = run_guarded(_call, *arguments)
    assert_as_accurate(actual, exact(_ref, *arguments), _ref(*arguments))


@pytest.mark.parametrize("num_taps", range(1, MAX_TAPS + 1))
def test_every_tap_meets_its_columns(num_taps, device):
    taps = [torch.full((2, 4), 10.0**i, device=device) for i in range(num_taps)]
    weight = torch.zeros(num_taps, num_taps * 4, device=device)
    for i in range(num_taps):
        weight[i, i * 4] = 1.0
    expected = [10.0**i for i in range(num_taps)]
    assert aux_projection(taps, weight).tolist() == [expected, expected]
    residuals = [torch.full_like(tap, 1.0 + i) for i, tap in enumerate(taps)]
    expected = [10.0**i + 1.0 + i for i in range(num_taps)]
    assert aux_projection(taps, weight, residuals=residuals).tolist() == [expected, expected]


@pytest.mark.parametrize("norm", NORMS)
def test_gains_meet_their_taps(norm, device):
    taps = [torch.ones(1, 4, device=device)] * MAX_TAPS
    gain = torch.arange(32.0, device=device)
    norms = {"tap": TapNorm(gain.split(4), 1e-9), "joint": JointNorm(gain, 1e-9), None: None}
    y = aux_projection(taps, torch.eye(32, device=device), norm=norms[norm])
    torch.testing.assert_close(y[0], gain if norm else torch.ones_like(gain), rtol=1e-6, atol=0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e6, 1e18])
def test_normed_rows_of_any_magnitude(magnitude, device):
    """On a GPU in bfloat16, whose float16 operands need a scale; float32 needs none."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    taps, weight, bias, _, norm, scale = _inputs((2, 2, 40, 20), device, dtype, "tap", False, True)
    _check(([tap * magnitude for tap in taps], weight, bias, None, norm, scale))


def test_large_gains_do_not_overflow_float16(device):
    taps, weight, _, _, _, _ = _inputs((1, 2, 40, 20), device, torch.float16)
    gain = torch.full((40,), 50.0, device=device).half()
    arguments = ([taps[0] * 2000], weight, None, None, JointNorm(gain, 1e-5), None)
    assert (taps[0] * 2000 * 50).isinf().any()
    _check(arguments)


def test_slices_of_a_capture_buffer_are_read_in_place(device):
    buffer = normal((5, 3, 40), torch.float32, device)
    taps = list(buffer.unbind(1))
    _, weight, *_ = _inputs((3, 5, 40, 30), device)
    assert torch.equal(
        aux_projection(taps, weight), aux_projection([*map(torch.clone, taps)], weight)
    )
    assert [tap.data_ptr() for tap in _with_one_stride(taps)] == [tap.data_ptr() for tap in taps]
    mixed = [taps[0], taps[1].clone(), taps[2]]
    residuals = [tap.expand(5, 40) for tap in buffer[:1].unbind(1)]
    expected = aux_projection_ref(mixed, weight, residuals=residuals)
    torch.testing.assert_close(aux_projection(mixed, weight, residuals=residuals), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_no_rows(norm, device):
    assert _call(*_inputs((3, 0, 32, 32), device, norm=norm, residual=True)).shape == (0, 32)


@pytest.mark.parametrize("norm", NORMS)
def test_special_values_stay_in_their_row(norm, device):
    taps, *others = _inputs((2, 3, 40, 20), device, torch.float16, norm, True, True)
    check_rows_apart(lambda x: _call([taps[0], x], *others), taps[1], 1)


@pytest.mark.parametrize("bias", [False, True])
def test_module_uses_its_parameters(bias, device):
    module = AuxProjection(16, 3, 24, bias, "triton").to(device)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"][: 1 + bias]
    taps, weight, bias_F, *_ = _inputs((3, 2, 16, 24), device)
    module.load_state_dict({"weight": weight, "bias": bias_F} if bias else {"weight": weight})
    assert torch.equal(module(taps), aux_projection(taps, weight, bias_F if bias else None))


def test_opcheck_and_compile(device):
    taps, weight, bias, residuals, norm, _ = _inputs(
        (2, 2, 16, 24), device, norm="tap", residual=True
    )
    gains = list(norm.weights)
    torch.library.opcheck(_aux_projection_op, (taps, residuals, gains, weight, bias, None, 1, 1e-5))
    torch.library.opcheck(_aux_projection_op, (taps, [], [], weight, None, None, 0, 0.0))
    again = [torch.cat([tap, tap]) for tap in taps]
    check_compiles(aux_projection, taps, weight, bias, again=(again, weight, bias))


def test_rejects_bad_arguments(device):
    taps, weight, bias, _, norm, _ = _inputs((3, 2, 16, 24), device, norm="tap")
    gain = torch.ones(48, device=device)
    rejected = [
        ("taps: must be 1 to 8 tensors, got 0", ([], weight), {}),
        ("taps: must be 1 to 8 tensors, got 9", (taps * 3, weight), {}),
        (r"taps\[1\]: must be \(2, 16\)", ([taps[0], taps[1][:, :8], taps[2]], weight), {}),
        (r"taps\[1\]: must be .* got .* torch.float16", ([taps[0], taps[1].half()], weight), {}),
        (r"taps\[0\]: must be float32", ([taps[0].double()], weight), {}),
        (r"taps\[0\]: .*contiguous", ([taps[0].t()], weight), {}),
        (r"weight_FI: must be \[F, 48\]", (taps, weight[:, :32]), {}),
        ("weight_FI: must be torch.float32", (taps, weight.half()), {}),
        (r"bias: must be a contiguous \[24\]", (taps, weight, bias[:8]), {}),
        ("residuals: must be 3", (taps, weight), {"residuals": taps[:2]}),
        (r"residuals\[2\]: must be", (taps, weight), {"residuals": [*taps[:2], taps[2].half()]}),
        ("norm.weights: must be 3", (taps, weight), {"norm": TapNorm(norm.weights[:2], 1e-5)}),
        (
            r"norm.weights\[0\]: must be a contiguous \[16\]",
            (taps, weight),
            {"norm": TapNorm((gain,) * 3, 1e-5)},
        ),
        (r"norm.weight_I: .*\[48\]", (taps, weight), {"norm": JointNorm(gain[:16], 1e-5)}),
        ("scale_F: must be given with FP8", (taps, weight.to(FP8)), {}),
    ]
    for message, arguments, named in rejected:
        with pytest.raises(ValueError, match=message):
            aux_projection(*arguments, **named)


@pytest.mark.parametrize("through_registers", [False, True])
@pytest.mark.parametrize(("itemsize", "weight_itemsize"), [(2, 2), (2, 1), (4, 4), (4, 1)])
@pytest.mark.parametrize("rows", [1, 17, 64, 65, 1000])
def test_launch_config(rows, itemsize, weight_itemsize, through_registers):
    config = _launch_config(
        HOPPER, rows, 5120, 5120, 3, itemsize, weight_itemsize, through_registers
    )
    assert 16 <= config.BLOCK_T <= 128
    stage = (config.BLOCK_F * weight_itemsize + config.BLOCK_T * itemsize) * config.BLOCK_D
    assert config.num_stages * stage <= 99 * 1024
    assert (rows <= 65) == config.SPLIT


def test_three_taps_of_scout_are_one_wave():
    config = _launch_config(HOPPER, 1, 5120, 5120, 3, 2, 2, False)
    assert (config.PARTS, config.SPLIT) == (1, True)
    assert 3 * 5120 // config.BLOCK_F <= 2 * stream_launch.SMS
