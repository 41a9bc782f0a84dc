"""Row gather against its reference.

Regimes: widths off a power of two and on both sides of a block, repeated ids, no rows, strided and
expanded tables, rows beyond 2^31 elements, an id outside the table (NaN, never a stray read),
writes outside the output, unequal runs, bad arguments.
"""

import pytest
import torch
from hypothesis import given

from aerie.kernels.embedding import (
    Embedding,
    _embedding_op,
    _launch_config,
    embedding,
    embedding_ref,
)
from tests.evidence import (
    VAST,
    check_compiles,
    edges,
    few_examples,
    laid_out,
    layouts,
    normal,
    on_gpu,
    run_guarded,
    same_bits,
    vast,
)

# rows, table, width; 1024 columns fill a program
CASES = [
    (1, 1, 1),
    (5, 3, 63),
    (2, 3, 1023),
    (2, 3, 1024),
    (2, 3, 1025),
    (4, 100, 1500),
    (0, 8, 16),
]
REAL = on_gpu((1, 202048, 5120), (64, 202048, 5120), (4096, 32000, 5120))


@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_matches_ref(case, device, dtypes):
    rows, table, width = case
    for dtype in dtypes:
        weight = torch.randn(table, width, device=device).to(dtype)
        ids = torch.randint(table, (rows,), device=device)
        assert same_bits(run_guarded(embedding, ids, weight), embedding_ref(ids, weight))


@few_examples
@given(edges(4, 6), edges(4, 6), edges(64, 100), layouts())
def test_any_shape_and_layout(device, rows, table, width, layout):
    weight = normal((table, width), torch.float16, device)
    ids = torch.arange(rows, device=device) * 7 % table
    assert same_bits(run_guarded(embedding, ids, laid_out(weight, layout)), weight[ids])


def test_row_beyond_32_bit_offsets(device):
    weight = vast(40, torch.float16, device).as_strided((3, 40), (VAST // 2, 1))
    weight[2], weight[1] = 2.0, 1.0
    ids = torch.tensor([2, 0, 1], device=device)
    assert embedding(ids, weight)[:, 7].tolist() == [2.0, 0.0, 1.0]


def test_expanded_table(device):
    weight = torch.randn(1, 40, device=device)
    ids = torch.tensor([2, 0], device=device)
    assert same_bits(embedding(ids, weight.expand(3, 40)), weight.expand(2, 40))


def test_strided_table(device):
    weight = torch.randn(7, 200, device=device)[:, 30:130]
    ids = torch.tensor([6, 0, 6], device=device)
    assert same_bits(embedding(ids, weight), weight[ids])


def test_id_outside_the_table_gives_nan(device):
    weight = torch.randn(4, 40, device=device)
    ids = torch.tensor([0, 4, -1, 2**62, 3], device=device)
    y = embedding(ids, weight)
    assert y[1:4].isnan().all()
    assert torch.equal(y[[0, 4]], weight[[0, 3]])


def test_nan_stays_in_its_row(device):
    weight = torch.randn(3, 40, device=device)
    weight[1] = torch.nan
    ids = torch.tensor([2, 1, 0], device=device)
    assert embedding(ids, weight).isnan().any(dim=1).tolist() == [False, True, False]


def test_module_uses_the_weight(device):
    table = Embedding(9, 20, "triton").to(device)
    table.weight.data.normal_()
    ids = torch.tensor([8, 1], device=device)
    assert torch.equal(table(ids), table.weight[ids])


def test_compiles_once_for_all_row_counts(device):
    ids, weight = torch.tensor([1, 0, 1], device=device), torch.randn(4, 24, device=device)
    check_compiles(embedding, ids[:2], weight, again=(ids, weight))


def test_opcheck(device):
    ids, weight = torch.tensor([1, 0, 1], device=device), torch.randn(2, 24, device=device)
    torch.library.opcheck(_embedding_op, (ids, weight))
    torch.library.opcheck(_embedding_op, (ids, torch.randn(2, 48, device=device)[:, 8:32]))


def test_rejects_bad_arguments(device):
    ids, weight = torch.tensor([0, 1], device=device), torch.randn(2, 16, device=device)
    with pytest.raises(ValueError, match="ids_T: must be a contiguous int64"):
        embedding(ids.int(), weight)
    with pytest.raises(ValueError, match="ids_T: must be a contiguous int64"):
        embedding(ids[:, None], weight)
    with pytest.raises(ValueError, match="ids_T: must be a contiguous int64"):
        embedding(ids[:1].expand(2), weight)
    with pytest.raises(ValueError, match=r"weight_VD: must be (\[V, D\]|float32)"):
        embedding(ids, weight.int())
    with pytest.raises(ValueError, match="contiguous last dimension"):
        embedding(ids, weight.t())


def test_rejects_float64(device):
    with pytest.raises(ValueError, match="weight_VD: must be float32, float16 or bfloat16"):
        embedding(torch.tensor([0], device=device), torch.ones(2, 3, device=device).double())


@pytest.mark.parametrize("width", [1, 63, 128, 5120])
def test_launch_config(width):
    config = _launch_config(width)
    assert config.BLOCK_D <= 1024
    assert config.BLOCK_D & (config.BLOCK_D - 1) == 0
    assert 1 <= config.num_warps <= 16
