"""Draws against their reference, id by id, and against the probabilities they are draws from.

Regimes: one id, widths around a quarter and a block, several blocks, Llama 4's vocabulary; no
filter, top-k, top-p, min-p, all of them; greedy rows among others; ties of scores and of logits;
masked ids; NaN, +inf and nothing but -inf in one row; tiny temperatures; strided rows; the same
draw whichever rows stand beside it; rows cut into columns; the law of the draws; more rows than a
grid is high; bad arguments.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerie.kernels import draw as module
from aerie.kernels.choice_key import key_id
from aerie.kernels.draw import _draw_op, draw, draw_keys, draw_keys_ref, draw_ref
from aerie.kernels.row_filter import row_filter, row_filter_ref
from aerie.kernels.target_probs import target_probs_ref
from tests.evidence import (
    check_compiles,
    edges,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
)

FILTERS = {
    "none": (1.0, 0, 1.0, 0.0),
    "top-k": (0.7, 5, 1.0, 0.0),
    "top-p": (1.3, 0, 0.8, 0.0),
    "min-p": (1.0, 0, 1.0, 0.1),
    "all": (0.9, 20, 0.9, 0.02),
    "greedy": (0.0, 0, 1.0, 0.0),
    "nearly greedy": (1e-30, 0, 1.0, 0.0),
}


def kept(logits, temperature, k=0, p=1.0, least=0.0):
    rows, device = len(logits), logits.device
    numbers = [torch.full((rows,), x, device=device) for x in (temperature, p, least)]
    return row_filter_ref(logits, numbers[0], torch.full((rows,), k, device=device), *numbers[1:])


def keys(rows, device, seed=5):
    return (
        torch.arange(rows, device=device) * 1_000_003 + seed,
        torch.arange(rows, device=device) % 3 + 40,
    )


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    "shape", [(3, 1), (2, 1000), (1, 4097), *on_gpu((8, 202048))], ids=lambda s: f"{s[0]}x{s[1]}"
)
def test_matches_ref(shape, filters, device, dtypes):
    for dtype in dtypes:
        logits = normal(shape, dtype, device)
        arguments = logits, kept(logits, *FILTERS[filters]), *keys(shape[0], device)
        assert same_bits(run_guarded(draw, *arguments), draw_ref(*arguments))


@few_examples
@given(edges(2, 4), edges(1024, 2050), layouts(), st.sampled_from(sorted(FILTERS)))
def test_any_shape_layout_and_filter(device, rows, vocabulary, layout, filters):
    values = normal((rows, vocabulary), torch.float32, device).mul(2).round().half()
    filter = kept(values, *FILTERS[filters])
    logits = laid_out(values, layout)
    ids = run_guarded(draw, logits, filter, *keys(rows, device), runs=1)
    assert same_bits(ids, draw_ref(values, filter, *keys(rows, device)))


def test_follows_the_filter_of_the_kernel(device):
    """The two kernels one after the other, as the sampler runs them."""
    logits = normal((2, 1500), torch.float32, device)
    numbers = [torch.full((2,), x, device=device) for x in (0.8, 0.9)]
    top_k = torch.tensor([7, 0], device=device)
    ids = draw(logits, row_filter(logits, numbers[0], top_k, numbers[1]), *keys(2, device))
    filter = row_filter_ref(logits, numbers[0], top_k, numbers[1])
    assert same_bits(ids, draw_ref(logits, filter, *keys(2, device)))
    assert (target_probs_ref(logits, ids[:, None], filter) > 0).all()


def test_greedy_takes_the_lowest_of_the_largest(device):
    logits = torch.zeros(2, 3000, device=device)
    logits[0, [900, 2100]] = 4.0
    for op in (draw, draw_ref):
        assert op(logits, kept(logits, 0.0), *keys(2, device)).tolist() == [900, 0]


def test_any_number_of_rows_is_a_grid(monkeypatch):
    """CUDA takes 2^31 - 1 programs in the first place and 65535 in the others."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    for kernel in ("_draw_kernel", "_draw_merge_kernel"):
        monkeypatch.setattr(module, kernel, Recorder())
    logits = torch.zeros(70_000, 2)
    draw(logits, kept(logits, 1.0), *keys(70_000, "cpu"))
    assert grids == [(70_000, 1), (70_000,)]


def test_masked_ids_are_never_drawn(device):
    logits = torch.full((3, 2000), -torch.inf, device=device)
    logits[0, 17], logits[1, 1999], logits[2, :2] = -50.0, 3.0, torch.tensor([0.0, -torch.inf])
    for op in (draw, draw_ref):
        assert op(logits, kept(logits, 1.0), *keys(3, device)).tolist() == [17, 1999, 0]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, None], ids=["NaN", "+inf", "all -inf"])
def test_illegal_row_is_minus_one_and_no_other(poison, device):
    logits = normal((3, 1100), torch.float32, device)
    clean = draw(logits, kept(logits, 1.0), *keys(3, device))
    if poison is None:
        logits[1] = -torch.inf
    else:
        logits[1, 1050] = poison
    for filter in (kept(logits, 1.0), row_filter(logits, torch.ones(3, device=device))):
        for op in (draw, draw_ref):
            ids = op(logits, filter, *keys(3, device))
            assert ids.tolist() == [clean[0], -1, clean[2]]


def test_a_row_does_not_depend_on_its_neighbours():
    logits = normal((4, 300), torch.float32, "cpu")
    seeds, positions = keys(4, "cpu")
    ids = draw_ref(logits, kept(logits, 1.0), seeds, positions)
    order = torch.tensor([2, 0, 3])
    others = draw_ref(logits[order], kept(logits[order], 1.0), seeds[order], positions[order])
    assert torch.equal(others, ids[order])


@pytest.mark.parametrize(("cut", "filters"), [(1, "all"), (4095, "none"), (4096, "greedy")])
def test_keys_of_columns(cut, filters, device):
    """The best of the parts of a row is the best of the row, across and within blocks of noise."""
    logits = normal((3, 4200), torch.float32, device)
    logits[1, cut:], logits[2, 7] = -torch.inf, torch.nan
    filter, (seeds, positions) = kept(logits, *FILTERS[filters]), keys(3, device)
    for op in (draw_keys, draw_keys_ref):
        parts = [
            op(part, filter, seeds, positions, first)
            for part, first in ((logits[:, :cut], 0), (logits[:, cut:], cut))
        ]
        ids = key_id(torch.maximum(*parts))
        assert same_bits(ids, draw_ref(logits, filter, seeds, positions))
        assert key_id(parts[1])[2] == -1
    assert same_bits(parts[1][:1], draw_keys(logits[:, cut:], filter, seeds, positions, cut)[:1])


@pytest.mark.parametrize("key", ["seed", "position"])
def test_law(key):
    """Chi-square of 40,000 draws over positions, and over seeds, from one row; alpha 1e-6."""
    count, logits = 40_000, normal((1, 12), torch.float32, "cpu").expand(40_000, 12)
    filter = kept(logits, 0.8, 0, 0.97)
    counter, same = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    seeds, positions = (counter, same) if key == "seed" else (same, counter)
    seen = draw_ref(logits, filter, seeds, positions).bincount(minlength=12)
    expected = target_probs_ref(logits[:1], torch.arange(12)[None], filter_row(filter))[0] * count
    assert (seen[expected == 0] == 0).all()
    cells = expected > 5
    chi_square = ((seen - expected)[cells] ** 2 / expected[cells]).sum()
    assert chi_square < 52.5  # 11 degrees of freedom or fewer


def filter_row(filter):
    return type(filter)(*(getattr(filter, name)[:1] for name in filter.__dataclass_fields__))


def test_opcheck(device):
    logits = normal((2, 70), torch.float32, device)
    filter = kept(logits, 1.0)
    columns = filter.maximum_T, filter.scale_T, filter.threshold_T, filter.last_id_T
    torch.library.opcheck(_draw_op, (logits, *columns, *keys(2, device)))


def test_compiles_once_for_all_row_counts(device):
    calls = []
    for rows in (2, 3):
        logits = normal((rows, 70), torch.float32, device)
        calls.append((logits, kept(logits, 1.0), *keys(rows, device)))
    check_compiles(draw, *calls[0], again=calls[1])


def test_rejects_bad_arguments(device):
    logits = normal((2, 70), torch.float32, device)
    filter, (seeds, positions) = kept(logits, 1.0), keys(2, device)
    with pytest.raises(ValueError, match="logits_TV: must be float32"):
        draw(logits[0], filter, seeds, positions)
    with pytest.raises(ValueError, match=r"row_filter\.maximum_T: must be"):
        draw(logits[:1], filter, seeds, positions)
    with pytest.raises(ValueError, match="seeds_T: must be"):
        draw(logits, filter, seeds.int(), positions)
    with pytest.raises(ValueError, match="positions_T: must be"):
        draw(logits, filter, seeds, positions[:1])
    with pytest.raises(ValueError, match="first: must be the id of the first column, got -1"):
        draw_keys(logits, filter, seeds, positions, -1)
