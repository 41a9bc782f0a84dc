"""FP8 rows times FP8 weights against the formula in float64.

Regimes: scales per tensor, channel and block; widths off every tile; one row and several tiles of
them; split depth; bias; torch's product where the rule takes it; NaN in one row; no rows; the
compiler; bad arguments; the rule.
"""

import pytest
import torch

from aerie.kernels import experts_launch
from aerie.kernels.quantize import FP8, Quantized, quantize_ref
from aerie.kernels.scaled_linear import (
    _launch_config,
    _scaled_linear_op,
    quantises_rows,
    scaled_linear,
    scaled_linear_ref,
    takes_scaled_mm,
)
from aerie.kernels.target import BLACKWELL, HOPPER, MI300
from aerie.kernels.tree_rows import MAX_TREE_ROWS
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    exact,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
    takes_row_scales,
)

CASES = [(1, 130, 200), (5, 300, 129), (66, 140, 40)]  # T D F
REAL = on_gpu(*((T, 5120, 7168) for T in (1, 8, 64, 300)))


def make_inputs(case, scales: str, device, bias: bool = False) -> tuple:
    rows, depth, features = case
    x = normal((rows, depth), torch.float32, device, 1)
    weight = normal((features, depth), torch.float32, device, 2).to(FP8)
    shapes = {"tensor": (1,), "channel": (features,)}
    shape = shapes.get(scales, (-(-features // 128), -(-depth // 128)))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(3)).to(device) + 0.5
    added = normal((features,), torch.float32, device, 4) if bias else None
    return quantize_ref(x, scales == "block"), weight, scale, added


def check(inputs: tuple, dtype: torch.dtype) -> None:
    y = run_guarded(scaled_linear, *inputs, dtype)
    truth = exact(scaled_linear_ref, *inputs, torch.float64)
    assert_as_accurate(y, truth, scaled_linear_ref(*inputs, dtype))


@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_the_formula(case, scales, device):
    dtype = torch.float16 if case[0] == 5 else torch.float32
    check(make_inputs(case, scales, device, bias=case[0] == 5), dtype)


@pytest.mark.parametrize("scales", ["channel", "block"])
def test_any_split_of_the_depth(scales, monkeypatch, device):
    monkeypatch.setattr(experts_launch, "_splits", lambda *_: 3)
    check(make_inputs((3, 520, 60), scales, device), torch.float32)


def test_torch_multiplies_many_rows(device):
    if not takes_row_scales(device):
        pytest.skip(f"torch {torch.__version__} has no product with scales per row on {device}")
    inputs = make_inputs((66, 128, 48), "channel", device, bias=True)
    assert _launch_config(HOPPER, 66, 48, 128, False, torch.bfloat16).scaled_mm
    check(inputs, torch.bfloat16)
    check(make_inputs((66, 128, 48), "tensor", device), torch.bfloat16)


def test_nan_stays_in_its_row(device):
    rows, *rest = make_inputs((4, 130, 40), "channel", device)
    clean = scaled_linear(rows, *rest, torch.float32)
    rows.scales_TN[1] = torch.nan  # the interpreter reads the code of NaN as a number
    dirty = scaled_linear(rows, *rest, torch.float32)
    assert dirty[1].isnan().all()
    others = [0, 2, 3]
    assert same_bits(dirty[others], clean[others])


def test_no_rows(device):
    assert scaled_linear(*make_inputs((0, 32, 16), "channel", device)).shape == (0, 16)


def test_opcheck_and_compile(device):
    rows, weight, scale, bias = make_inputs((2, 64, 32), "channel", device, bias=True)
    arguments = rows.codes_TD, rows.scales_TN, weight, scale, bias, torch.float32
    # not its test of the schema, which cannot compare FP8: `run_guarded` compares the arguments
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_scaled_linear_op, arguments, test_utils=checks)
    again = make_inputs((5, 64, 32), "channel", device, bias=True)
    check_compiles(
        scaled_linear, rows, weight, scale, bias, torch.float32, again=(*again, torch.float32)
    )


def test_rejects_bad_arguments(device):
    rows, weight, scale, _ = make_inputs((2, 256, 300), "channel", device)
    codes, scales = rows.codes_TD, rows.scales_TN
    blocks = torch.ones(3, 2, device=device)
    rejected = [
        ("rows.codes_TD: must be a contiguous", (Quantized(codes.float(), scales), weight, scale)),
        ("rows.scales_TN: must be .* one per row", (Quantized(codes, blocks), weight, scale)),
        ("rows.scales_TN: must be .* one per 128 columns", (rows, weight, blocks)),
        ("weight_FD: must be", (rows, weight.view(torch.uint8).view(torch.float8_e5m2), scale)),
        (r"weight_FD: must be \[F, 256\]", (rows, weight[:, :9].contiguous(), scale)),
        ("scale: must be a contiguous", (rows, weight, scale[:9])),
        ("bias_F: must be a contiguous", (rows, weight, scale, scale[:9])),
        ("dtype: must be float32", (rows, weight, scale, None, torch.float64)),
    ]
    for message, arguments in rejected:
        with pytest.raises(ValueError, match=message):
            scaled_linear(*arguments)


def test_rule():
    """A step of at most 64 rows streams the weights once; torch takes prompts, where it can."""
    prompt = (65, 5120, 5120, False, torch.bfloat16)
    for target in (HOPPER, BLACKWELL):
        assert takes_scaled_mm(target, *prompt)
    assert not takes_scaled_mm(MI300, *prompt)
    for other in ((64, *prompt[1:]), (65, 5121, *prompt[2:]), (65, 5120, 5121, *prompt[3:])):
        assert not takes_scaled_mm(HOPPER, *other)
    assert not takes_scaled_mm(HOPPER, 65, 5120, 5120, True, torch.bfloat16)
    assert not takes_scaled_mm(HOPPER, 65, 5120, 5120, False, torch.float16)
    for rows in (1, 8, 16, 33, 64):
        tiles = _launch_config(HOPPER, rows, 5120, 5120, False, torch.bfloat16).tiles
        assert rows <= tiles.WIDE_T
        assert tiles.BLOCK_N >= 64  # rows of a Hopper product
        assert tiles.BLOCK_K <= 128  # what one sum of 14 bits takes
        assert tiles.SPLITS * 5120 // tiles.BLOCK_N >= 132


def test_no_round_meets_codes():
    """Decoded tokens, the widest tree, and all of its path behind which a turn goes on."""
    assert not any(map(quantises_rows, range(MAX_TREE_ROWS + 2)))
    assert [quantises_rows(rows) for rows in (128, 129, 1024)] == [False, True, True]
