"""The kernels of `experts` against its reference.

Regimes: every granularity of scales and none; widths off the tile in all directions; one row, rows
past a narrow tile, past 64 pairs and so sorted; one choice and two; 128 experts; histograms that
are all to one, uniform and uneven; NaN in the experts nobody chose; experts elsewhere; splits of
the depth, their bits and their counters; given codes; strided rows; no rows; special values in one
row; offsets past 32 bits; the promotion that Hopper needs; the compiler, bad arguments, the rules.
"""

from dataclasses import replace

import pytest
import torch

from aerie.kernels import experts_launch as launch
from aerie.kernels.arrivals import arrival_counters
from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.experts import (
    _experts_op,
    _launch_config,
    experts,
    experts_ref,
)
from aerie.kernels.quantize import FP8, Quantized, quantize_ref
from aerie.kernels.router import Routing
from aerie.kernels.target import HOPPER
from tests.evidence import (
    VAST,
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    exact,
    laid_out,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
    vast,
)
from tests.kernels.test_expert_order import make_ids
from tests.kernels.test_experts_ref import FORMATS, Case, make_inputs, part_of

CASES = [Case(1, 1, 4, 130, 100), Case(5, 2, 3, 200, 140), Case(19, 1, 2, 65, 129)]
FEW, MORE = Case(3, 2, 128, 40, 24), Case(70, 1, 128, 40, 24)
REAL = on_gpu(*(Case(T, 1, 16, 5120, 8192) for T in (1, 8, 64, 300)), Case(8, 2, 128, 5120, 1024))
HISTOGRAMS = ("all to one", "uniform", "adversarial", "last")


def check(*arguments) -> torch.Tensor:
    y = run_guarded(experts, *arguments)
    assert_as_accurate(y, exact(experts_ref, *arguments), experts_ref(*arguments))
    return y


def routed(ids: torch.Tensor, dtype=torch.float32) -> Routing:
    scores = torch.linspace(0.2, 0.9, ids.numel(), device=ids.device).to(dtype)
    return Routing(ids, scores.view(ids.shape))


@pytest.fixture
def splits(monkeypatch):
    """Sets the number of shares of the depth, as other widths would."""
    return lambda n: monkeypatch.setattr(launch, "_splits", lambda *_: n)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_ref(case, format, device, dtypes):
    for dtype in dtypes:
        check(*make_inputs(case, format, device, dtype))


@pytest.mark.parametrize(
    ("case", "format"), [(FEW, "plain"), (FEW, "channel"), (MORE, "block")], ids=str
)
def test_128_experts(case, format, device):
    """More experts than pairs, streamed and sorted; the last one is among the chosen."""
    x, routing, *rest = make_inputs(case, format, device)
    routing.ids_TA[-1, -1] = 127
    check(x, routing, *rest)


@pytest.mark.parametrize("format", ["plain", "channel", "block"])
@pytest.mark.parametrize("kind", HISTOGRAMS)
def test_histograms(kind, format, device):
    """Experts that nobody chose are NaN: they are not read."""
    x, _, gate_up, down, shared = make_inputs(Case(23, 1, 3, 72, 40), format, device)
    ids = make_ids(kind, 23, 1, 3, device)
    unchosen = [e for e in range(3) if e not in ids]
    for matrix in (gate_up, down):
        raw = matrix.weight.view(torch.uint8) if matrix.is_fp8 else matrix.weight
        raw[unchosen] = 0x7F if matrix.is_fp8 else torch.nan
        if matrix.scale is not None:
            matrix.scale[unchosen] = torch.nan
    assert check(x, routed(ids), gate_up, down, shared).isfinite().all()


@pytest.mark.parametrize("format", ["plain", "channel", "block"])
def test_prompts_are_cut_into_sorted_tiles(format, device):
    """66 and 133 pairs: tiles of 64, one expert with more than one of them."""
    x, _, gate_up, down, shared = make_inputs(Case(133, 1, 2, 40, 36), format, device)
    for kind, rows in (("random", 66), ("adversarial", 133)):
        routing = routed(make_ids(kind, rows, 1, 2, device))
        check(x[:rows], routing, gate_up, down, shared[:rows])


def test_the_widest_tiles(device):
    x, _, gate_up, down, shared = make_inputs(Case(140, 1, 2, 40, 36), "plain", device)
    assert launch.tile_pairs(HOPPER, 140, 2, False) == 128
    check(x, routed(make_ids("adversarial", 140, 1, 2, device)), gate_up, down, shared)


@pytest.mark.parametrize("format", ["plain", "static", "block"])
@pytest.mark.parametrize("first", [0, 2, 7])
def test_experts_elsewhere(first, format, device):
    """Of six experts two are here; rows of others get their shared output, untouched."""
    x, routing, gate_up, down, shared = make_inputs(Case(7, 2, 6, 72, 40), format, device)
    own = [part_of(matrix, slice(first % 4, first % 4 + 2)) for matrix in (gate_up, down)]
    y = check(x, routing, *own, shared, first)
    is_here = ((routing.ids_TA >= first) & (routing.ids_TA < first + 2)).any(dim=1)
    assert torch.equal(y[~is_here], shared[~is_here])
    assert is_here.any() == (first < 6)


def test_without_a_shared_output(device):
    for case in (Case(3, 1, 3, 72, 40), Case(3, 2, 3, 72, 40)):
        check(*make_inputs(case, "channel", device)[:4])


@pytest.mark.parametrize(("shares", "format"), [(2, "plain"), (3, "channel"), (3, "block")])
def test_any_split_of_the_depth(shares, format, splits, device):
    splits(shares)
    depth, width = (150, 70) if format == "plain" else (400, 300)
    x, routing, gate_up, down, shared = make_inputs(Case(18, 1, 3, depth, width), format, device)
    check(x, routing, gate_up, down, shared)
    own = [part_of(matrix, slice(1, 3)) for matrix in (gate_up, down)]
    check(x[:5], Routing(routing.ids_TA[:5], routing.scores_TA[:5]), *own, shared[:5], 1)
    assert arrival_counters(x, launch.MOST_TILES).count_nonzero() == 0


def test_given_codes_are_used(device):
    for format in ("channel", "block"):
        x, *rest = make_inputs(Case(4, 2, 3, 200, 140), format, device)
        codes = quantize_ref(x, grouped=format == "block")
        expected = experts(x, *rest)
        assert same_bits(experts(x * torch.nan, *rest, 0, codes), expected)


def test_score_is_on_the_input(device):
    for format in ("plain", "channel", "static"):
        x, routing, gate_up, down, _ = make_inputs(Case(3, 1, 2, 72, 40), format, device)
        halved = Routing(routing.ids_TA, torch.full_like(routing.scores_TA, 0.5))
        ones = Routing(routing.ids_TA, torch.ones_like(routing.scores_TA))
        on_input = experts(x, halved, gate_up, down)
        assert torch.equal(on_input, experts(x * 0.5, ones, gate_up, down))
        assert (on_input - experts(x, ones, gate_up, down) * 0.5).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["offset", "columns", "row steps"])
def test_layouts(layout, device):
    for format in ("plain", "channel"):
        x, routing, gate_up, down, shared = make_inputs(Case(4, 2, 3, 72, 40), format, device)
        expected = experts(x, routing, gate_up, down, shared)
        actual = experts(laid_out(x, layout), routing, gate_up, down, laid_out(shared, layout))
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("format", ["plain", "channel"])
def test_no_rows(format, device):
    x, routing, gate_up, down, shared = make_inputs(Case(2, 1, 3, 72, 40), format, device)
    none = Routing(routing.ids_TA[:0], routing.scores_TA[:0])
    assert experts(x[:0], none, gate_up, down, shared[:0]).shape == (0, 72)


@pytest.mark.parametrize("format", FORMATS)
def test_special_values_stay_in_their_row(format, device):
    x, _, gate_up, down, shared = make_inputs(Case(5, 1, 2, 72, 40), format, device)
    routing = routed(make_ids("all to one", 5, 1, 2, device))
    check_rows_apart(lambda rows: experts(rows, routing, gate_up, down, shared), x, 2)
    x[2] = 0
    assert torch.equal(experts(x, routing, gate_up, down, shared)[2], shared[2])


@pytest.mark.parametrize(
    ("number", "width"), [(517, 512), pytest.param(128, 2112, marks=pytest.mark.slow)]
)
def test_offsets_past_32_bits(number, width, device):
    """Both weights of the last expert lie behind 2^31 elements; in front of them is zero.

    128 experts as Maverick has: gate and up of the last one begin behind 2^32. What no expert is
    read from takes no memory.
    """
    depth = 8192
    shapes, matrices = ((number, 2 * width, depth), (number, depth, width)), []
    for shape in shapes:
        count = torch.Size(shape).numel()
        weight = vast(max(0, count - VAST), torch.uint8, device)[:count].view(shape)
        last = normal(shape[1:], torch.float32, device) * shape[2] ** -0.5
        weight[-1].copy_((last * 64).to(FP8).view(torch.uint8))
        scale = torch.full((number, shape[1], 1), 1 / 64, device=device)
        matrices.append(ExpertMatrix(weight.view(FP8), scale))
    assert (number - 1) * 8192 * width > VAST
    x = normal((1, depth), torch.float16, device)
    routing = routed(torch.full((1, 1), number - 1, dtype=torch.int32, device=device), x.dtype)
    small = [part_of(matrix, slice(number - 1, number)) for matrix in matrices]
    expected = experts_ref(x, routing, *small, None, number - 1)
    actual = experts(x, routing, *matrices)
    torch.testing.assert_close(actual, expected, atol=0.01, rtol=0.02)


def test_opcheck_and_compile(device):
    x, routing, gate_up, down, shared = make_inputs(Case(2, 2, 3, 40, 24), "plain", device)
    ids, scores = routing.ids_TA, routing.scores_TA
    weights = gate_up.weight, None, None, down.weight, None, None
    torch.library.opcheck(_experts_op, (x, ids, scores, *weights, shared, None, None, 0))
    gate_up, down = make_inputs(Case(2, 2, 3, 40, 24), "channel", device)[2:4]
    twice = Routing(*(torch.cat([r, r]) for r in (routing.ids_TA, routing.scores_TA)))
    again = (torch.cat([x, x]), twice, gate_up, down, torch.cat([shared, shared]))
    check_compiles(experts, x, routing, gate_up, down, shared, again=again)


def test_rejects_bad_arguments(device):
    x, routing, gate_up, down, shared = make_inputs(Case(2, 1, 3, 40, 24), "channel", device)
    plain = make_inputs(Case(2, 1, 3, 40, 24), "plain", device)[3]
    ids, scores = routing.ids_TA, routing.scores_TA
    codes = quantize_ref(x)
    rejected = [
        ("x_TD: must be float32", (x.double(), routing, gate_up, down)),
        (r"x_TD: must be \[T, D\]", (x[0], routing, gate_up, down)),
        (r"gate_up.weight: must be output-major", (x[:, :9].contiguous(), routing, gate_up, down)),
        (r"down.weight: must be \[E, D, F\]", (x, routing, gate_up, replace(down, weight=ids))),
        ("down.weight: must be in the format", (x, routing, gate_up, plain)),
        ("shared_TD: must be", (x, routing, gate_up, down, shared[:1])),
        ("shared_TD: must be", (x, routing, gate_up, down, shared.half())),
        ("routing.ids_TA: must be", (x, Routing(ids.long(), scores), gate_up, down)),
        ("routing.scores_TA: must be", (x, Routing(ids, scores.half()), gate_up, down)),
        ("first_expert: must be at least 0", (x, routing, gate_up, down, shared, -1)),
        (
            "quantized.scales_TN: must be",
            (x, routing, gate_up, down, None, 0, Quantized(codes.codes_TD, codes.scales_TN[:1])),
        ),
        (
            "quantized: must come with FP8 weights without",
            (x, routing, replace(gate_up, input_scale=scores[:1, 0]), down, None, 0, codes),
        ),
    ]
    for message, arguments in rejected:
        with pytest.raises(ValueError, match=message):
            experts(*arguments)


@pytest.mark.parametrize("is_fp8", [True, False])
def test_launch_rules(is_fp8):
    """Memory of an SM, bytes in flight, and the crossover from one tile per expert to many."""
    for pairs in (1, 2, 8, 16, 17, 33, 64, 65, 300, 1024, 1025, 16384):
        config = _launch_config(HOPPER, pairs, 16, 5120, 8192, 2, is_fp8)
        assert config.tile_pairs >= min(pairs, 64)  # an expert of a small step has one tile
        for product in (config.gate_up, config.down):
            size = 1 if is_fp8 else 2
            weights = product.BLOCK_N * product.BLOCK_K * size
            stage = weights + product.WIDE_T * product.BLOCK_K * size
            assert product.num_stages * stage <= 227 * 1024
            assert config.tile_pairs == product.WIDE_T
            assert product.SPLITS == 1 or pairs <= launch.FEW_PAIRS
            if pairs <= launch.FEW_PAIRS:
                per_sm = min(2, 227 * 1024 // (product.num_stages * stage))
                assert per_sm * (product.num_stages - 1) * weights >= 64 * 1024
                assert product.BLOCK_N >= 64  # rows of a Hopper product
    one = _launch_config(HOPPER, 1, 16, 5120, 8192, 2, is_fp8)
    assert one.gate_up.SPLITS * 16384 // one.gate_up.BLOCK_N >= 132
    assert one.down.SPLITS * 5120 // one.down.BLOCK_N >= 132
    assert launch.tile_pairs(HOPPER, 64 * 16 + 1, 16, is_fp8) == (64 if is_fp8 else 128)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["plain", "channel", "block"])
def test_graph_capture(format, device):
    """Replayed with other rows and another routing than it was captured with, twice."""
    x, routing, gate_up, down, shared = make_inputs(Case(8, 1, 16, 1024, 512), format, device)
    experts(x, routing, gate_up, down, shared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = experts(x, routing, gate_up, down, shared)
    for seed in (1, 2):
        other = make_inputs(Case(8, 1, 16, 1024, 512), format, device, seed=seed)
        for own, new in ((x, other[0]), (routing.ids_TA, other[1].ids_TA)):
            own.copy_(new)
        graph.replay()
        assert same_bits(captured, experts(x, routing, gate_up, down, shared))


def hopper_sum(products_K: torch.Tensor, promoted_after: int) -> float:
    """What an FP8 unit of Hopper adds up: 32 products at a time onto a sum of 14 bits, cut off;
    every `promoted_after` products that sum is added in float32 and starts again."""

    def cut(value: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(value)
        return torch.ldexp(torch.trunc(mantissa * 2**14), exponent - 14)

    total = torch.zeros((), dtype=torch.float32)
    for part in products_K.double().split(promoted_after):
        partial = torch.zeros((), dtype=torch.float64)
        for added in part.split(32):
            partial = cut(partial + added.sum())
        total += partial.float()
    return total.item()


@pytest.mark.parametrize("pairs", [1, 64, 65, 4096])
def test_promotion_bounds_the_error_on_hopper(pairs):
    """Each of the sums cuts off less than 2^-13 of itself; 8192 columns in one lose far more."""
    config = _launch_config(HOPPER, pairs, 16, 5120, 8192, 2, True)
    codes = normal((2, 8192), torch.float32, "cpu").abs().to(FP8).double()
    products = codes[0] * codes[1]  # of one sign: the sum grows, and with it what is cut off
    truth = products.sum().item()
    for product in (config.gate_up, config.down):
        bound = product.BLOCK_K // 32 * 2**-13 + 8192 / product.BLOCK_K * 2**-24
        assert bound < 5e-4
        assert abs(hopper_sum(products, product.BLOCK_K) - truth) <= bound * truth
        assert abs(hopper_sum(products, 8192) - truth) > 8 * bound * truth
