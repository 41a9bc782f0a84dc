"""The evidence kit is green on sound work and red on each defect it is there to find."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from torch._dynamo.exc import RecompileError, Unsupported

from tests.evidence import (
    GUARD_BYTES,
    LAYOUTS,
    assert_as_accurate,
    check_compiles,
    check_rows_apart,
    edges,
    exact,
    few_examples,
    guarded,
    guarded_allocations,
    laid_out,
    normal,
    run_guarded,
    same_bits,
    tensors,
    ulp,
)

inf, nan = torch.inf, torch.nan


@dataclass(frozen=True)
class Pair:
    x: torch.Tensor
    name: str


def halves(truth=(1.0, 2.0, 3.0)):
    x = torch.tensor(truth, dtype=torch.float64)
    return x.half(), x, x.half()


def test_accuracy_floor_is_two_ulp_where_eager_is_exact():
    actual, truth, eager = halves()
    step = ulp(3.0, torch.float16)
    assert_as_accurate(actual, truth, eager)
    assert_as_accurate(actual + 2 * step, truth, eager)
    with pytest.raises(AssertionError, match=r"kernel error 5.85.*eager error 0.*worst at \(1,\)"):
        assert_as_accurate(actual + torch.tensor([0.0, 3 * step, 0.0]).half(), truth, eager)


def test_accuracy_allows_twice_the_eager_error():
    actual, truth, eager = halves()
    eager = eager + torch.tensor([0.0, 0.5, 0.0]).half()
    assert_as_accurate(actual + torch.tensor([1.0, 0.0, 0.0]).half(), truth, eager)
    with pytest.raises(AssertionError, match="kernel error 1.25"):
        assert_as_accurate(actual + torch.tensor([1.25, 0.0, 0.0]).half(), truth, eager)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_accuracy_refuses_a_stray_special_value(bad):
    actual, truth, eager = halves()
    actual[2] = bad
    with pytest.raises(AssertionError, match=r"worst at \(2,\)"):
        assert_as_accurate(actual, truth, eager)


@pytest.mark.parametrize(
    ("special", "wrong"), [(nan, 1.0), (inf, -inf), (inf, 65504.0), (nan, inf)]
)
def test_accuracy_demands_the_special_values_of_the_truth(special, wrong):
    actual, truth, eager = halves((1.0, special, 3.0))
    assert_as_accurate(actual, truth, eager)
    actual[1] = wrong
    with pytest.raises(AssertionError, match=r"NaN or infinity misplaced in 1 .* at \(1,\)"):
        assert_as_accurate(actual, truth, eager)


def test_accuracy_takes_either_side_of_an_overflow():
    truth = torch.tensor([65519.0, 1.0], dtype=torch.float64)
    largest, over = torch.tensor([65504.0, 1.0]).half(), torch.tensor([inf, 1.0]).half()
    for actual in (largest, over):
        assert_as_accurate(actual, truth, over)


def test_accuracy_refuses_other_shapes_and_dtypes():
    actual, truth, eager = halves()
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate(actual[:2], truth, eager)
    with pytest.raises(AssertionError, match="actual torch.float16, eager torch.float32"):
        assert_as_accurate(actual, truth, eager.float())
    with pytest.raises(AssertionError, match="exact: must be float64"):
        assert_as_accurate(actual, truth.float(), eager)
    assert_as_accurate(actual[:0], truth[:0], eager[:0])


def test_ulp():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for value in (0.0, 1e-30, 0.1, 1.0, 3.0, 1024.0):
            x = torch.tensor(value, dtype=dtype)
            above = torch.nextafter(x, torch.full_like(x, inf)).double() - x.double()
            assert ulp(x.item(), dtype) == pytest.approx(above.item(), abs=2.0**-24)
            assert ulp(-x.item(), dtype) == ulp(x.item(), dtype)


def test_exact_widens_everything_inside():
    def ref(pair, factors, codes):
        return pair.x * factors[0] * codes.to(pair.x.dtype)

    codes = torch.tensor([2.0]).to(torch.float8_e4m3fn)
    truth = exact(ref, Pair(torch.tensor([1 / 3]), "a"), [torch.tensor([3.0])], codes)
    assert truth.dtype == torch.float64
    assert truth.item() == 2 * 3 * torch.tensor(1 / 3).item()


def test_exact_refuses_a_reference_that_narrows():
    def ref(x):
        return x.float() * 2

    with pytest.raises(AssertionError, match=r"ref gave torch.float32 for float64"):
        exact(ref, torch.ones(2))


def test_tensors_of_nested_results():
    x, y = torch.ones(1), torch.zeros(2)
    assert [t.numel() for t in tensors((x, [Pair(y, "b"), None], 3))] == [1, 2]


def test_same_bits():
    x = torch.tensor([1.0, nan, 0.0])
    assert same_bits(x, x.clone())
    assert same_bits(x[::2], x[::2].clone())
    assert not same_bits(x, torch.tensor([1.0, nan, -0.0]))
    assert not same_bits(x, x.double())
    assert not same_bits(x, x[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64, torch.float8_e4m3fn])
@pytest.mark.parametrize("beyond", [-1, 3])
def test_guards_notice_one_element(beyond, dtype, device):
    x, check = guarded((3,), dtype, device)
    assert x.data_ptr() % 16 == 0
    assert not dtype.is_floating_point or x.float().isnan().all()
    x.copy_(torch.ones(3))
    check()
    whole = torch.empty(0, dtype=dtype, device=device).set_(
        x.untyped_storage(), 0, (2 * GUARD_BYTES // dtype.itemsize,)
    )
    whole[GUARD_BYTES // dtype.itemsize + beyond] = 0
    with pytest.raises(AssertionError, match=r"bytes written (before|behind) a .* \(3,\)"):
        check()


def test_guarded_allocations_cover_what_an_op_allocates(device):
    def op(x, stray):
        outputs = x.new_empty(3), x.new_zeros((2, 1)), x.new_full((2,), 7.0)
        assert outputs[0].isnan().all()
        assert [y.tolist() for y in outputs[1:]] == [[[0.0], [0.0]], [7.0, 7.0]]
        assert x.new_empty(1, 2, dtype=torch.int64).dtype == torch.int64
        for y in outputs[:stray]:
            y.as_strided((y.numel() + 1,), (1,))[-1] = 0.0

    x = torch.ones(1, device=device)
    with guarded_allocations():
        op(x, 0)
    with pytest.raises(AssertionError, match="bytes written behind"), guarded_allocations():
        op(x, 1)


def test_run_guarded_finds_unequal_runs_and_changed_arguments(device):
    x = torch.ones(2, device=device)
    assert torch.equal(run_guarded(lambda y: (y + 1, y), x)[0], x + 1)
    with pytest.raises(AssertionError, match="two runs differ in 2 elements"):
        run_guarded(lambda y: torch.rand_like(y), x)
    with pytest.raises(AssertionError, match="changed one of its arguments"):
        run_guarded(lambda y: y.add_(1) * 0, x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_layouts_keep_the_values_and_poison_the_rest(layout, dtype, device):
    x = torch.arange(12, device=device).view(3, 4).to(dtype)
    view = laid_out(x, layout)
    assert torch.equal(view, x)
    assert view.stride(-1) == 1
    storage = torch.empty(0, dtype=dtype, device=device).set_(view.untyped_storage())
    assert (storage.double().nan_to_num(1e9) >= 12).sum() == storage.numel() - 12
    assert laid_out(x[:0], layout).shape == (0, 4)


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout: must be one of"):
        laid_out(torch.ones(2), "diagonal")


def test_edges_reach_both_sides_of_a_block():
    seen = set()

    @few_examples
    @given(edges(8, 20))
    def collect(n):
        assert 1 <= n <= 20
        seen.add(n)

    collect()
    first = set(seen)
    seen.clear()
    collect()
    assert seen == first
    assert seen & {7, 8, 9}


def test_normal_depends_on_shape_and_seed_only(device):
    assert same_bits(normal((2, 3), torch.float32, device), normal((2, 3), torch.float32, device))
    assert not same_bits(*(normal((4,), torch.float32, device, seed) for seed in (0, 1)))


def test_compile_check(device):
    def breaks(x):
        torch._dynamo.graph_break()
        return x

    def counts_rows(x):
        return x * (2.0 if x.shape[0] > 2 else 1.0)

    two, three = torch.ones(2, 4, device=device), torch.ones(3, 4, device=device)
    check_compiles(lambda x: x * 2, two, again=(three,))
    with pytest.raises(Unsupported):
        check_compiles(breaks, two)
    with pytest.raises(RecompileError):
        check_compiles(counts_rows, two, again=(three,))


def test_rows_apart(device):
    x = torch.ones(3, 4, device=device)
    check_rows_apart(lambda y: (y * 2, y.sum(dim=1)), x, 1)
    with pytest.raises(AssertionError, match="nan left row 1"):
        check_rows_apart(lambda y: y - y.mean(), x, 1)
    with pytest.raises(AssertionError, match="inf left row 2"):
        check_rows_apart(lambda y: y + y.nan_to_num(posinf=9.0, nan=1.0).max(), x, 2)
