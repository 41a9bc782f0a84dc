"""Router against its reference.

Regimes: 1 to 256 experts on and off a power of two, one choice and several (up to all), rows on
both sides of what a program takes, no rows, ties (lowest id first, signed zeros included), infinite
logits, NaN in one row, strided and expanded rows, writes outside the outputs, unequal runs, bad
arguments.
"""

import pytest
import torch
from hypothesis import given

from aerie.kernels.router import MAX_EXPERTS, _launch_config, _router_op, router, router_ref
from tests.evidence import (
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    edges,
    exact,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
)

# rows, experts, choices; a program takes 16 rows of 16 experts
CASES = [(1, 1, 1), (3, 16, 1), (40, 16, 2), (5, 7, 7), (2, 128, 1), (2, 256, 3), (0, 16, 1)]
EDGES = [(15, 16, 1), (16, 16, 1), (17, 16, 1), (3, 255, 1)]
REAL = on_gpu((1, 16, 1), (64, 128, 1), (4096, 16, 1), (4096, 128, 1))


def _check(logits, choices):
    actual, eager = run_guarded(router, logits, choices), router_ref(logits, choices)
    assert actual.ids_TA.dtype == torch.int32
    assert same_bits(actual.ids_TA, eager.ids_TA)
    truth = exact(router_ref, logits, choices).scores_TA
    assert_as_accurate(actual.scores_TA, truth, eager.scores_TA)


@pytest.mark.parametrize("case", [*CASES, *EDGES, *REAL], ids=str)
def test_as_accurate_as_eager(case, device, dtypes):
    rows, num_experts, choices = case
    for dtype in dtypes:
        _check(torch.randn(rows, num_experts, device=device).to(dtype), choices)


@few_examples
@given(edges(16, 20), edges(16, 40), layouts())
def test_any_shape_and_layout(device, rows, num_experts, layout):
    logits = normal((rows, num_experts), torch.float16, device)
    _check(laid_out(logits, layout), min(3, num_experts))


@pytest.mark.parametrize("choose", [router, router_ref], ids=["triton", "eager"])
@pytest.mark.parametrize("choices", [1, 3, 9])
def test_ties_go_to_the_lowest_id(choose, choices, device):
    few_values = torch.randint(3, (12, 9), device=device).float() - 1
    signed_zeros = torch.tensor([[-0.0, 0.0, -0.0] * 3], device=device)
    logits = torch.cat((few_values, signed_zeros))
    expected = [sorted(range(9), key=lambda e: (-row[e], e))[:choices] for row in logits.tolist()]
    assert choose(logits, choices).ids_TA.tolist() == expected


def test_infinite_logits(device):
    inf = torch.inf
    logits = torch.tensor([[-inf, -inf, -inf], [inf, 0.0, -inf]], device=device)
    routing = router(logits, 3)
    assert routing.ids_TA.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert routing.scores_TA.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.5, 0.0]]


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_gives_a_nan_score_in_its_row(sign, choices, device):
    logits = torch.randn(3, 5, device=device)
    logits[1, 3] = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    actual, expected = router(logits, choices), router_ref(logits, choices)
    assert torch.equal(actual.ids_TA, expected.ids_TA)
    assert actual.ids_TA[1, 0] == 3
    assert actual.scores_TA.isnan().nonzero().tolist() == [[1, 0]]


def test_strided_and_expanded_rows(device):
    _check(torch.randn(4, 40, device=device)[:, 3:14], 2)
    _check(torch.randn(1, 11, device=device).expand(4, 11), 2)


def test_nan_and_infinity_stay_in_their_row(device):
    check_rows_apart(lambda x: router(x, 2), torch.randn(3, 9, device=device), 1)


def test_compiles_once_for_all_row_counts(device):
    logits = torch.randn(5, 16, device=device)
    check_compiles(router, logits[:2], 1, again=(logits, 1))


def test_opcheck(device):
    torch.library.opcheck(_router_op, (torch.randn(3, 16, device=device), 1))
    torch.library.opcheck(_router_op, (torch.randn(3, 32, device=device)[:, 4:20], 2))


def test_rejects_bad_arguments(device):
    logits = torch.randn(2, 4, device=device)
    with pytest.raises(ValueError, match=r"logits_TE: must be \[T, E\]"):
        router(logits[0], 1)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        router(logits.t(), 1)
    with pytest.raises(ValueError, match="logits_TE: must be float32, float16 or bfloat16"):
        router(logits.int(), 1)
    with pytest.raises(ValueError, match="experts_per_token: must be 1 to 4, got 5"):
        router(logits, 5)
    with pytest.raises(ValueError, match="experts_per_token: must be 1 to 4, got 0"):
        router(logits, 0)
    with pytest.raises(ValueError, match=f"1 to {MAX_EXPERTS} experts, got {MAX_EXPERTS + 1}"):
        router(torch.randn(1, MAX_EXPERTS + 1, device=device), 1)


def test_rejects_float64(device):
    with pytest.raises(ValueError, match="logits_TE: must be float32, float16 or bfloat16"):
        router(torch.ones(2, 3, device=device).double(), 1)


@pytest.mark.parametrize("num_experts", [1, 7, 16, 128, 256])
def test_launch_config(num_experts):
    config = _launch_config(num_experts)
    assert num_experts <= config.BLOCK_E < 2 * num_experts
    assert 1 <= config.BLOCK_T * config.BLOCK_E <= 512
