"""Draft head cut out of a target head: rows bit by bit, offsets against ids.

Regimes: first and last id kept, one id, all ids; every dtype of a head, with NaN and -0; both
backends; the way back from offsets; the cut head under `draft_vocab`; ids that fall, repeat, are
negative, too large, of another type or none.
"""

import pytest
import torch

from aerie.kernels.draft_vocab import draft_vocab
from aerie.kernels.head_rows import head_rows, ids_from_offsets, offsets_from_ids
from tests.evidence import same_bits

IDS = ([0], [6], [0, 6], [1, 2, 5], list(range(7)))


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("ids", IDS, ids=str)
def test_rows_keep_their_bits(ids, backend, device, dtypes):
    for dtype in (*dtypes, torch.float8_e4m3fn):
        head = torch.randn(7, 33, device=device)
        head[:, 0], head[:, 1] = torch.nan, -0.0
        head, kept = head.to(dtype), torch.tensor(ids, device=device)
        rows = head_rows(head[:, :32], kept, backend)
        expected = head.view(torch.uint8).view(7, -1)[kept, : 32 * dtype.itemsize]
        actual = rows.view(torch.uint8).view(len(ids), -1)
        is_nan = torch.zeros_like(expected, dtype=torch.bool)
        is_nan[:, : dtype.itemsize] = True  # a NaN stays one, but not always the same
        assert rows[:, 0].float().isnan().all()
        assert torch.equal(actual.masked_fill(is_nan, 0), expected.masked_fill(is_nan, 0))


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_offsets_and_back(ids, device):
    kept = torch.tensor(ids, device=device)
    d2t = offsets_from_ids(kept, 7)
    assert d2t.tolist() == [id - u for u, id in enumerate(ids)]
    assert same_bits(ids_from_offsets(d2t), kept)


def test_cut_head_gives_target_ids(device):
    head, kept = torch.randn(100, 16, device=device), torch.arange(3, 97, 5, device=device)
    hidden, d2t = torch.randn(2, 16, device=device), offsets_from_ids(kept, 100)
    tokens = draft_vocab(hidden, head_rows(head, kept, "triton"), d2t, 3)
    logits = (hidden @ head.t())[:, kept]
    assert torch.equal(tokens.ids_TA, kept[logits.argsort(descending=True)[:, :3]])


@pytest.mark.parametrize("ids", [[1, 0], [2, 2], [-1, 2], [3, 7]], ids=str)
def test_rejects_ids_out_of_order_or_range(ids, device):
    kept, head = torch.tensor(ids, device=device), torch.randn(7, 4, device=device)
    with pytest.raises(ValueError, match=r"ids_U: must rise strictly within 0\.\.6, got"):
        offsets_from_ids(kept, 7)
    with pytest.raises(ValueError, match=r"ids_U: must rise strictly within 0\.\.6, got"):
        head_rows(head, kept, "eager")


@pytest.mark.parametrize("bad", [torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([]).long()])
def test_rejects_other_tensors(bad):
    with pytest.raises(ValueError, match="ids_U: must be int64"):
        offsets_from_ids(bad, 7)
