"""Routed experts against their reference and against Hugging Face's Llama 4.

Regimes: widths off a tile, on both sides of its edge and several tiles deep, one choice and two,
all rows on one expert, no rows, the score on the input and not on the output, an expert nobody
chose holding NaN, NaN and infinity in one row, strided and expanded rows, experts beyond 2^31
elements, writes outside the output, unequal runs, bad arguments.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from aerie.kernels.experts import _experts_op, _launch_config, experts, experts_ref
from aerie.kernels.router import Routing, router_ref
from tests.evidence import (
    VAST,
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    edges,
    few_examples,
    laid_out,
    layouts,
    on_gpu,
    run_guarded,
    same_bits,
    vast,
)

# T A E D F; 64 columns and 64 deep is a tile
CASES = [(1, 1, 4, 40, 33), (5, 1, 4, 100, 70), (3, 2, 3, 63, 130), (4, 3, 3, 16, 16)]
EDGES = [(2, 1, 2, 64, 64), (2, 1, 2, 65, 63)]
REAL = on_gpu((1, 1, 16, 5120, 8192), (16, 1, 16, 5120, 8192), (64, 1, 32, 5120, 8192))
TOLERANCE = 2e-6  # float32 sums of two libraries in another order


def make_inputs(case, device, dtype=torch.float32):
    """The five arguments of `experts`, scaled so that every intermediate is of order one."""
    rows, choices, num_experts, depth, width = case
    x, shared = (torch.randn(rows, depth, device=device).to(dtype) for _ in range(2))
    gate_up = torch.randn(num_experts, depth, 2 * width, device=device) * depth**-0.5
    down = torch.randn(num_experts, width, depth, device=device) * width**-0.5
    routing = router_ref(torch.randn(rows, num_experts, device=device).to(dtype), choices)
    return x, routing, gate_up.to(dtype), down.to(dtype), shared


def dense_experts(x, routing, gate_up, down, shared):
    """The formula in float64, one pair at a time."""
    y = shared.double().clone()
    for t, (ids, scores) in enumerate(zip(routing.ids_TA, routing.scores_TA, strict=True)):
        for e, score in zip(ids.tolist(), scores.double(), strict=True):
            gate, up = ((x[t].double() * score) @ gate_up[e].double()).chunk(2)
            y[t] += (F.silu(gate) * up) @ down[e].double()
    return y


@pytest.mark.parametrize("case", [*CASES, *EDGES, *REAL], ids=str)
def test_as_accurate_as_eager(case, device, dtypes):
    for dtype in dtypes:
        inputs = make_inputs(case, device, dtype)
        actual = run_guarded(experts, *inputs)
        assert_as_accurate(actual, dense_experts(*inputs), experts_ref(*inputs))


@few_examples
@given(edges(2, 3), edges(2, 2), edges(64, 70), edges(64, 70), layouts())
def test_any_shape_and_layout(device, rows, choices, depth, width, layout):
    torch.manual_seed(depth)
    x, *rest, shared = make_inputs((rows, choices, 3, depth, width), device)
    inputs = (laid_out(x, layout), *rest, laid_out(shared, layout))
    actual = run_guarded(experts, *inputs, runs=1)
    assert_as_accurate(actual, dense_experts(*inputs), experts_ref(*inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ref_matches_the_formula(case, device, assert_close):
    inputs = make_inputs(case, device)
    assert_close(experts_ref(*inputs), dense_experts(*inputs).float(), TOLERANCE)


def test_expert_beyond_32_bit_offsets(device):
    """The last of so many experts that the weights of both products begin past 2^31 elements."""
    depth, width = 64, 32
    x, routing, *weights, shared = make_inputs((2, 1, 1, depth, width), device, torch.float16)
    last = VAST // (depth * width)
    many = [vast(last * x[0].numel() - VAST + x[0].numel(), torch.float16, device) for x in weights]
    far = [x.view(last + 1, *w.shape[1:]) for x, w in zip(many, weights, strict=True)]
    for x_far, weight in zip(far, weights, strict=True):
        x_far[last] = weight[0]
    far_routing = Routing(torch.full_like(routing.ids_TA, last), routing.scores_TA)
    expected = experts(x, routing, *weights, shared)
    assert same_bits(experts(x, far_routing, *far, shared), expected)


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("apply", [experts, experts_ref], ids=["triton", "eager"])
def test_matches_hugging_face(apply, choices, assert_close, device):
    config = Llama4TextConfig(
        hidden_size=48, intermediate_size=40, num_local_experts=4, num_experts_per_tok=choices
    )
    moe = Llama4TextMoe(config).to(device)
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.3)
    x = torch.randn(6, 48, device=device)
    with torch.no_grad():
        expected, logits = moe(x)
        shared = moe.shared_expert(x)
    routing = router_ref(logits, choices)
    weights = moe.experts.gate_up_proj.data, moe.experts.down_proj.data
    assert_close(apply(x, routing, *weights, shared), expected, TOLERANCE)


def test_score_is_on_the_input(device):
    x, routing, gate_up, down, shared = make_inputs((3, 1, 2, 32, 32), device)
    halved = Routing(routing.ids_TA, torch.full_like(routing.scores_TA, 0.5))
    ones = Routing(routing.ids_TA, torch.ones_like(routing.scores_TA))
    nothing = torch.zeros_like(shared)
    on_input = experts(x, halved, gate_up, down, nothing)
    assert torch.equal(on_input, experts(x * 0.5, ones, gate_up, down, nothing))
    on_output = experts(x, ones, gate_up, down, nothing) * 0.5
    assert (on_input - on_output).abs().max() > 0.1


@pytest.mark.parametrize("apply", [experts, experts_ref], ids=["triton", "eager"])
def test_unchosen_expert_is_not_read(apply, device):
    x, routing, gate_up, down, shared = make_inputs((3, 1, 3, 24, 20), device)
    routing = Routing(torch.tensor([[0], [2], [0]], device=device).int(), routing.scores_TA)
    gate_up[1], down[1] = torch.nan, torch.nan
    assert apply(x, routing, gate_up, down, shared).isfinite().all()


@pytest.mark.parametrize("apply", [experts, experts_ref], ids=["triton", "eager"])
def test_one_expert_chosen_by_all(apply, device, assert_close):
    x, routing, *rest = make_inputs((5, 2, 3, 24, 20), device)
    inputs = (x, Routing(torch.full_like(routing.ids_TA, 2), routing.scores_TA), *rest)
    assert_close(apply(*inputs), dense_experts(*inputs).float(), TOLERANCE)


@pytest.mark.parametrize("apply", [experts, experts_ref], ids=["triton", "eager"])
def test_nan_stays_in_its_row(apply, device):
    x, routing, *rest = make_inputs((4, 1, 2, 24, 20), device)
    routing = Routing(torch.tensor([[0], [0], [1], [0]], device=device).int(), routing.scores_TA)
    check_rows_apart(lambda rows: apply(rows, routing, *rest), x, 1)
    x[1, 3] = torch.nan
    assert apply(x, routing, *rest)[1].isnan().all()


@pytest.mark.parametrize("apply", [experts, experts_ref], ids=["triton", "eager"])
def test_no_rows(apply, device):
    assert apply(*make_inputs((0, 1, 2, 16, 16), device)).shape == (0, 16)


def test_strided_rows(device):
    x, routing, gate_up, down, shared = make_inputs((3, 1, 2, 24, 20), device)
    wide = torch.cat((x, shared), dim=1)
    views = (wide[:, :24], routing, gate_up, down, wide[:, 24:])
    assert same_bits(experts(*views), experts(x, routing, gate_up, down, shared))
    expanded = x[:1].expand(3, 24)
    actual = experts(expanded, routing, gate_up, down, expanded)
    assert same_bits(actual, experts(expanded.clone(), routing, gate_up, down, expanded.clone()))


def test_compiles_once_for_all_row_counts(device):
    x, routing, gate_up, down, shared = make_inputs((4, 1, 3, 24, 20), device)
    two = Routing(routing.ids_TA[:2], routing.scores_TA[:2])
    check_compiles(
        experts,
        *(x[:2], two, gate_up, down, shared[:2]),
        again=(x, routing, gate_up, down, shared),
    )


def test_opcheck(device):
    x, routing, gate_up, down, shared = make_inputs((2, 2, 3, 24, 20), device)
    for rows in (x, torch.cat((x, x), dim=1)[:, :24]):
        arguments = (rows, routing.ids_TA, routing.scores_TA, gate_up, down, shared)
        torch.library.opcheck(_experts_op, arguments)


def test_rejects_bad_arguments(device):
    x, routing, gate_up, down, shared = make_inputs((2, 1, 3, 16, 12), device)
    with pytest.raises(ValueError, match=r"x_TD: must be \[T, D\]"):
        experts(x[0], routing, gate_up, down, shared)
    with pytest.raises(ValueError, match=r"down_EFD: must be \[E, F, D\]"):
        experts(x, routing, gate_up, down[0], shared)
    with pytest.raises(ValueError, match=r"shared_TD: must be torch.float32 \(2, 16\)"):
        experts(x, routing, gate_up, down, shared[:1])
    with pytest.raises(ValueError, match=r"gate_up_EDF2: must be torch.float32 \(3, 16, 24\)"):
        experts(x, routing, gate_up.transpose(1, 2), down, shared)
    with pytest.raises(ValueError, match="down_EFD: must be .* contiguous"):
        experts(x, routing, gate_up, down.transpose(1, 2).contiguous().transpose(1, 2), shared)
    long_ids = Routing(routing.ids_TA.long(), routing.scores_TA)
    with pytest.raises(ValueError, match="routing.ids_TA: must be torch.int32"):
        experts(x, long_ids, gate_up, down, shared)
    half_scores = Routing(routing.ids_TA, routing.scores_TA.half())
    with pytest.raises(ValueError, match="routing.scores_TA: must be torch.float32"):
        experts(x, half_scores, gate_up, down, shared)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_rejects_other_dtypes(dtype, device):
    x, routing, gate_up, down, shared = make_inputs((2, 1, 3, 16, 12), device)
    x, scores, *rest = (y.to(dtype) for y in (x, routing.scores_TA, gate_up, down, shared))
    with pytest.raises(ValueError, match="x_TD: must be float32, float16 or bfloat16"):
        experts(x, Routing(routing.ids_TA, scores), *rest)


def test_launch_config():
    config = _launch_config()
    assert config == _launch_config()
    for block in (config.BLOCK_COLUMNS, config.BLOCK_DEPTH):
        assert block & (block - 1) == 0
    sums_per_thread = 2 * config.BLOCK_COLUMNS * config.BLOCK_DEPTH / (32 * config.num_warps)
    assert sums_per_thread <= 64  # of 255 registers
