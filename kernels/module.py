"""The base of our modules: `torch.nn.Module` with a quicker way to its submodules.

PyTorch keeps parameters and submodules in dicts of their own and answers for them in `__getattr__`,
which Python asks last, after a search that fails. That takes as long as a small operation on a CPU,
and a pass of the embedded target asked 287 times. So submodules are plain attributes as well; a
`forward` of a module that owns parameters reads `self._parameters`, which is always up to date.
"""

from typing import Any

from torch import nn


class Module(nn.Module):
    """`nn.Module` whose submodules are plain attributes too; names, state and hooks are PyTorch's.

    Replace a submodule by assignment or `set_submodule`; writing into `_modules` goes unnoticed.
    """

    _parameters: dict[str, Any]  # tensors, and None where a layer may have none

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        submodules = self.__dict__.get("_modules", {})
        if name in submodules:
            self.__dict__[name] = submodules[name]

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)
