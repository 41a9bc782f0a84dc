"""Stands in for hypothesis where it is not installed: tests of random cases are skipped, with why.

A GPU machine need not have it (`make gpu`); what it generates runs on every CPU.
"""

import sys
from types import ModuleType

import pytest

WHY = "hypothesis is not installed"


class _Anything:
    """A strategy that nobody will draw from."""

    def __getattr__(self, name: str) -> "_Anything":
        return self

    def __call__(self, *arguments, **named) -> "_Anything":
        return self

    def __or__(self, other: object) -> "_Anything":
        return self


def _settings(**named):
    return lambda test: test


def _given(*strategies, **named):
    def skipped(test):
        @pytest.mark.skip(reason=WHY)
        def never() -> None: ...

        never.__name__ = test.__name__
        return never

    return skipped


def install() -> None:
    """Makes `import hypothesis` find this."""
    module, strategies = ModuleType("hypothesis"), ModuleType("hypothesis.strategies")
    anything = _Anything()
    vars(module).update(
        given=_given, settings=_settings, strategies=strategies, HealthCheck=anything
    )
    vars(strategies)["__getattr__"] = lambda name: anything
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": strategies}
