"""Summing a weight before it is multiplied: only where it pays, and never with an effect."""

import pytest
import torch

from aerie.kernels import read_ahead as module
from aerie.kernels.linear import linear_ref
from aerie.kernels.read_ahead import CACHED_BYTES, pays, read_ahead


class Summed(torch.overrides.TorchFunctionMode):
    """Counts the sums that are asked for."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.sum
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("size", "does_pay", "sums"),
    [(4, True, 1), (4, False, 0), (CACHED_BYTES // 4, True, 1), (CACHED_BYTES // 4 + 1, True, 0)],
)
def test_small_matrices_are_summed_where_it_pays(size, does_pay, sums, monkeypatch):
    monkeypatch.setattr(module, "pays", lambda: does_pay)
    with Summed() as summed:
        read_ahead(torch.ones(size))
    assert summed.count == sums


def test_results_do_not_depend_on_it(monkeypatch):
    x, weight, outputs = torch.randn(3, 40), torch.randn(24, 40), []
    for does_pay in (True, False):
        monkeypatch.setattr(module, "pays", lambda answer=does_pay: answer)
        outputs.append(linear_ref(x, weight))
    assert torch.equal(*outputs)


def test_measured_once_by_the_clock(monkeypatch):
    """With a clock that only runs while sums are taken they never pay, and else always."""
    try:
        for costs_time in (True, False):
            pays.cache_clear()
            with Summed() as summed:
                monkeypatch.setattr(
                    module.time,
                    "perf_counter",
                    lambda summed=summed, sign=1 if costs_time else -1: sign * summed.count,
                )
                assert pays() == (not costs_time)
                before = summed.count
                pays()
            assert summed.count == before > 0
    finally:
        pays.cache_clear()
