"""Row gather against its reference.

Regimes: widths off a power of two and wider than a block, repeated ids, no rows, a table that is a
slice of a wider tensor, an id outside the table (NaN, never a stray read), bad arguments.
"""

import pytest
import torch

from aerie.kernels.embedding import (
    Embedding,
    _embedding_op,
    _launch_config,
    embedding,
    embedding_ref,
)

CASES = [(1, 1, 1), (5, 3, 63), (4, 100, 1500), (0, 8, 16)]  # rows, table, width


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_ref(case, device, dtypes):
    rows, table, width = case
    for dtype in dtypes:
        weight = torch.randn(table, width, device=device).to(dtype)
        ids = torch.randint(table, (rows,), device=device)
        assert torch.equal(embedding(ids, weight), embedding_ref(ids, weight))


def test_strided_table(device):
    weight = torch.randn(7, 200, device=device)[:, 30:130]
    ids = torch.tensor([6, 0, 6], device=device)
    assert torch.equal(embedding(ids, weight), weight[ids])


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
    with pytest.raises(ValueError, match=r"weight_VD: must be a floating point \[V, D\]"):
        embedding(ids, weight.int())
    with pytest.raises(ValueError, match="contiguous last dimension"):
        embedding(ids, weight.t())


@pytest.mark.parametrize("width", [1, 63, 128, 5120])
def test_launch_config(width):
    config = _launch_config(width)
    assert config.BLOCK_D <= 1024
    assert config.BLOCK_D & (config.BLOCK_D - 1) == 0
    assert 1 <= config.num_warps <= 16
