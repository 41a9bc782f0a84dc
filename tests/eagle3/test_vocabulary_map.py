"""The draft's vocabulary map: offsets `d2t`, and the membership `t2d` that must agree with them.

A wrong map proposes wrong tokens, is never accepted and raises nothing later: it is refused here.
"""

import pytest
import torch
from torch import Tensor

from aerie.llama4.json_fields import CheckpointError

VOCAB = 96
IDS = torch.arange(32) * 3  # the kept target ids; their offsets are 2 j


def marks(ids: Tensor) -> Tensor:
    """The membership of `ids`, as a checkpoint's `t2d` stores it."""
    return torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True)


@pytest.fixture
def load_map(draft_files, load_draft):
    """`load_map(d2t, t2d=None, name="t2d")`: a llama draft with these maps, as large as `d2t`."""

    def load(d2t: Tensor, t2d: Tensor | None = None, name: str = "t2d"):
        files = draft_files("llama", draft_vocab_size=len(d2t))
        files.tensors["d2t"] = d2t
        if t2d is not None:
            files.tensors[name] = t2d
        return load_draft(files)

    return load


def rejection(load_map, *maps) -> str:
    with pytest.raises(CheckpointError) as error:
        load_map(*maps)
    return str(error.value)


def test_map_of_another_integer_type(load_map):
    offsets = IDS - torch.arange(32)
    draft = load_map(offsets.int())
    assert torch.equal(draft.d2t, offsets)
    assert draft.d2t.dtype == torch.int64  # what the draft head's kernel reads


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("name", ["t2d", "model.t2d"])
def test_membership_that_agrees(name, dtype, load_map):
    draft = load_map(IDS - torch.arange(32), marks(IDS).to(dtype), name)
    assert torch.equal(draft.d2t, IDS - torch.arange(32))


def test_zero_offsets_mean_the_full_vocabulary(load_map):
    zeros = torch.zeros(VOCAB, dtype=torch.int64)
    assert not load_map(zeros).d2t.any()
    assert not load_map(zeros, torch.ones(VOCAB, dtype=torch.bool)).d2t.any()


DISAGREEING = {
    "marks nothing": marks(IDS[:0]),
    "marks everything": marks(torch.arange(VOCAB)),
    "one id missing": marks(IDS[:-1]),
    "one id more": marks(torch.cat((IDS, torch.tensor([95])))),
    "as many, one other": marks(torch.cat((IDS[:-1], torch.tensor([95])))),
    "one early": marks(IDS).roll(-1),
    "too short": marks(IDS)[:-1],
    "too long": torch.cat((marks(IDS), torch.zeros(1, dtype=torch.bool))),
}


@pytest.mark.parametrize("name", ["t2d", "model.t2d"])
@pytest.mark.parametrize("case", DISAGREEING)
def test_rejects_membership_that_disagrees(case, name, load_map):
    message = rejection(load_map, IDS - torch.arange(32), DISAGREEING[case], name)
    assert "t2d does not mark exactly the target ids j + d2t[j]" in message


def test_rejects_membership_of_a_part_beside_the_full_vocabulary(load_map):
    zeros = torch.zeros(VOCAB, dtype=torch.int64)
    assert "t2d does not mark" in rejection(load_map, zeros, marks(IDS))


MAPS = {
    "all zero": (IDS * 0, "d2t is all zero"),
    "target ids": (IDS, "not target ids"),
    "the first target ids": (torch.arange(32), "target ids where offsets belong"),
    "all target ids": (torch.arange(VOCAB), "offsets"),
    "below the vocabulary": (IDS - torch.arange(32) - 1, "within 0..95"),
    "above the vocabulary": (IDS - torch.arange(32) + 3, "within 0..95"),
    "falling": (-2 * torch.arange(32) + 90, "rise strictly"),
    "one id twice": (torch.tensor([0] * 31 + [-1]), "rise strictly"),
    "floats": ((IDS * 0).float(), "d2t: torch.float32, expected int32 or int64"),
}


@pytest.mark.parametrize("case", MAPS)
def test_rejects_map(case, load_map):
    offsets, expected = MAPS[case]
    assert expected in rejection(load_map, offsets)


def test_rejects_the_first_target_ids_even_with_their_membership(load_map):
    ids = torch.arange(32)
    assert "target ids where offsets belong" in rejection(load_map, ids, marks(ids))
    assert "target ids where offsets belong" in rejection(load_map, ids, marks(2 * ids))


def test_rejects_map_of_another_length(draft_files, load_draft):
    files = draft_files("llama")
    files.tensors["d2t"] = files.tensors["d2t"][:31].clone()
    with pytest.raises(CheckpointError, match=r"d2t: shape \(31,\), expected \(32,\)"):
        load_draft(files)


@pytest.mark.parametrize("first", [0, 2**63 - 1])
def test_rejects_map_whose_sums_wrap(first, load_map):
    """The wrapped sums rise and end below the vocabulary's size: the ends alone tell nothing."""
    last = 2**63 - 10 if first == 0 else first
    assert "within 0..95" in rejection(load_map, torch.tensor([first] * 31 + [last]))
