"""Packed projections: one matrix in memory, Hugging Face's names in every state dict."""

import pytest
import torch
from torch import nn

from aerie.kernels.linear import Linear
from aerie.llama4.packing import PackedModule, Packing, lay_out_for_eager

PARTS = {"q_proj": 6, "k_proj": 2, "v_proj": 2}


class Projections(PackedModule):
    def __init__(self, bias: bool) -> None:
        super().__init__(Packing("qkv_proj", PARTS))
        self.qkv_proj = Linear(4, sum(PARTS.values()), bias, "eager")


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def model(request):
    layers = nn.Sequential(Projections(request.param), Projections(request.param))
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    return layers


def test_state_dict_has_the_parts_in_order(model):
    state, packed = model.state_dict(), model[1].qkv_proj.weight
    leaves = ["weight", "bias"] if model[0].qkv_proj.bias is not None else ["weight"]
    assert set(state) == {f"{i}.{part}.{leaf}" for i in (0, 1) for part in PARTS for leaf in leaves}
    assert torch.equal(torch.cat([state[f"1.{part}.weight"] for part in PARTS]), packed)


def test_load_state_dict_is_strict_and_exact(model):
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(dict(state))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    del state["0.k_proj.weight"]
    with pytest.raises(RuntimeError, match=r"0\.qkv_proj\.weight"):
        model.load_state_dict(state)


def test_places_cover_the_packed_parameters_once(model):
    parameters = dict(model.named_parameters())
    covered = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for name, place in model[1].places(parameters, "1.", ()):
        covered[place.parameter][place.index] += 1
        assert model.state_dict()[name].shape in place.shapes
    assert all((tensor == name.startswith("1.")).all() for name, tensor in covered.items())


def test_eager_layout_moves_memory_and_nothing_else(model):
    rows = torch.randn(3, 4)
    before, state = model[0].qkv_proj(rows), model.state_dict()
    lay_out_for_eager(model)
    assert model[0].qkv_proj.weight.stride() == (1, 10)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.allclose(model[0].qkv_proj(rows), before, rtol=1e-6, atol=1e-6)
