"""The quick attributes of `Module` never disagree with what PyTorch keeps.

Regimes: replaced, set to None, deleted and set again, copied and pickled; hooks, `functional_call`,
conversion and state dicts of a module that reads its parameters directly; hooks of all modules, of
gradients, and `compile`, which the quick call must not pass by.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from aerie.kernels.linear import Linear
from aerie.kernels.module import Module


class _Pair(Module):
    def __init__(self):
        super().__init__()
        self.first = Linear(3, 3, True, "eager")
        self.second = Linear(3, 2, False, "eager")
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_()

    def forward(self, x_TD):
        return self.second(self.first(x_TD))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return _Pair()


X = torch.linspace(-1, 1, 6).view(2, 3)


def test_replaced_submodule_is_the_one_that_runs(pair):
    for replace in (setattr, nn.Module.set_submodule):
        pair.first = Linear(3, 3, False, "eager")
        replace(pair, "first", nn.Identity())
        assert torch.equal(pair(X), pair.second(X)), replace
        assert list(dict(pair.named_children())) == ["first", "second"]


def test_submodule_can_be_none_and_deleted(pair):
    pair.first = None
    assert pair.first is None
    assert dict(pair.named_children()) == {"second": pair.second}
    pair.first = nn.Identity()
    assert isinstance(pair.first, nn.Identity)
    del pair.first
    assert not hasattr(pair, "first")
    assert list(pair.state_dict()) == ["second.weight"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_submodules_of_their_own(pair, copied):
    other = copied(pair)
    assert other.first is other._modules["first"]
    other.first.weight.zero_()
    assert not torch.equal(other(X), pair(X))


def test_hooks_run(pair):
    seen = []
    pair.first.register_forward_hook(lambda module, args, out: seen.append(out))
    pair.second.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    expected = 2 * nn.functional.linear(X, pair.first.weight, pair.first.bias)
    assert torch.equal(pair(X), nn.functional.linear(expected, pair.second.weight))
    assert torch.equal(2 * seen[0], expected)


def test_every_way_of_replacing_a_parameter_is_seen(pair):
    doubled = {name: 2 * p for name, p in pair.named_parameters()}
    called = torch.func.functional_call(pair, doubled, (X,))
    pair.load_state_dict(doubled, assign=True)
    assert torch.equal(pair(X), called)
    assert pair.double()(X.double()).dtype == torch.float64
    pair.second.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64), requires_grad=False)
    assert not pair(X.double()).any()


GLOBAL_HOOKS = (
    "register_module_forward_pre_hook",
    "register_module_forward_hook",
    "register_module_full_backward_pre_hook",
    "register_module_full_backward_hook",
)


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_of_all_modules_run(pair, register):
    seen = []
    handle = getattr(nn.modules.module, register)(lambda module, *_: seen.append(module))
    x = X.clone().requires_grad_()
    try:
        pair(x).sum().backward()
    finally:
        handle.remove()
    assert set(seen) == {pair, pair.first, pair.second}
    pair(x).sum().backward()
    assert len(seen) == 3


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_hooks_of_gradients_run(pair, register):
    seen = []
    getattr(pair.first, register)(lambda module, *_: seen.append(module))
    pair(X.clone().requires_grad_()).sum().backward()
    assert seen == [pair.first]


def test_compiled_module_is_what_runs(pair):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = pair(X)
    pair.compile(backend=backend, fullgraph=True)
    assert torch.equal(pair(X), expected)
    assert len(graphs) == 1
