"""Norm, router and quantisation in one launch against the three references, one after the other.

Regimes: widths off a group, across several and below one; 1 to 17 experts, on and off a tile of
four, one choice and several; logits inside and as a product behind; codes per row, per group and
none; strided rows; NaN in one row; no rows; unequal runs; the compiler; bad arguments.
"""

import pytest
import torch

from aerie.kernels import moe_prologue as module
from aerie.kernels.moe_prologue import (
    MoEEntry,
    _launch_config,
    _moe_prologue_op,
    moe_prologue,
    moe_prologue_ref,
    routes_inside,
)
from aerie.kernels.quantize import quantize_ref
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    exact,
    laid_out,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
)

# T D E A codes
CASES = [
    (1, 40, 1, 1, "none"),
    (3, 200, 5, 2, "row"),
    (2, 300, 16, 1, "group"),
    (2, 128, 17, 3, "row"),
]
REAL = on_gpu((1, 5120, 16, 1, "row"), (64, 5120, 16, 1, "group"), (300, 5120, 128, 1, "row"))


def make_inputs(case, device, dtype=torch.float32) -> tuple:
    rows, width, experts, choices, shared = case
    x, residual = (normal((rows, width), dtype, device, seed) for seed in (1, 2))
    gain = normal((width,), dtype, device, 3) * 0.1 + 1
    router = normal((experts, width), dtype, device, 4) * width**-0.5
    return x, residual, gain, 1e-5, router, choices, shared


def codes(entry: MoEEntry) -> torch.Tensor:
    assert entry.quantized is not None
    return entry.quantized.codes_TD


def check(arguments) -> None:
    actual, eager = run_guarded(moe_prologue, *arguments), moe_prologue_ref(*arguments)
    truth = exact(moe_prologue_ref, *arguments[:-1])  # codes are never float64
    assert same_bits(actual.residual_TD, eager.residual_TD)
    assert_as_accurate(actual.normed_TD, truth.normed_TD, eager.normed_TD)
    assert torch.equal(actual.routing.ids_TA, eager.routing.ids_TA)
    scores = actual.routing.scores_TA, truth.routing.scores_TA, eager.routing.scores_TA
    assert_as_accurate(*scores)
    if arguments[-1] == "none":
        assert actual.quantized is None
        return
    expected = quantize_ref(actual.normed_TD, arguments[-1] == "group")
    assert same_bits(actual.quantized.codes_TD, expected.codes_TD)
    assert same_bits(actual.quantized.scales_TN, expected.scales_TN)


@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_the_three_steps(case, device, dtypes):
    for dtype in dtypes:
        check(make_inputs(case, device, dtype))


def test_logits_as_a_product_behind(device, monkeypatch):
    """Many rows or experts: same row, same codes, routed by the ops `linear` and `router`."""
    monkeypatch.setattr(module, "MOST_INSIDE", 0)
    check(make_inputs(CASES[1], device))


def test_layouts(device):
    x, residual, *rest = make_inputs(CASES[1], device)
    expected = moe_prologue(x, residual, *rest)
    for layout in ("offset", "columns", "row steps"):
        actual = moe_prologue(laid_out(x, layout), laid_out(residual, layout), *rest)
        assert same_bits(actual.normed_TD, expected.normed_TD)
        assert same_bits(codes(actual), codes(expected))


def test_special_values_stay_in_their_row(device):
    x, residual, *rest = make_inputs((4, 200, 5, 2, "row"), device)
    check_rows_apart(lambda rows: moe_prologue(rows, residual, *rest), x, 1)
    x[1] = torch.nan
    assert moe_prologue(x, residual, *rest).routing.scores_TA[1].isnan().all()


def test_no_rows(device):
    entry = moe_prologue(*make_inputs((0, 40, 4, 1, "row"), device))
    assert entry.normed_TD.shape == codes(entry).shape == (0, 40)


def test_opcheck_and_compile(device):
    arguments = make_inputs((2, 40, 4, 1, "row"), device)
    torch.library.opcheck(_moe_prologue_op, arguments)
    again = make_inputs((5, 40, 4, 1, "row"), device)
    check_compiles(moe_prologue, *arguments, again=again)


def test_rejects_bad_arguments(device):
    x, residual, gain, eps, router, _, _ = make_inputs((2, 40, 4, 1, "row"), device)
    rejected = [
        ("weight_D: must be a contiguous", (x, residual, gain[:9], eps, router, 1)),
        ("residual_TD: must match x_TD", (x, residual[:1], gain, eps, router, 1)),
        (r"router_ED: must be a contiguous \[E, 40\]", (x, residual, gain, eps, router.t(), 1)),
        ("router_ED: must be torch.float32 of", (x, residual, gain, eps, router.half(), 1)),
        ("experts_per_token: must be 1 to 4", (x, residual, gain, eps, router, 5)),
        ("codes: must be", (x, residual, gain, eps, router, 1, "column")),
    ]
    for message, arguments in rejected:
        with pytest.raises(ValueError, match=message):
            moe_prologue(*arguments)


def test_launch_rules():
    """Every step of up to 64 rows routes inside at 16 experts; prompts and 128 experts do not."""
    assert routes_inside(64, 16)
    assert not routes_inside(65, 16)
    assert not routes_inside(1, 128)
    config = _launch_config(1, 5120, 16)
    assert config.BLOCK_G * 128 >= 5120
    assert config.BLOCK_E == 16
