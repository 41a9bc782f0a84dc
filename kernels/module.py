"""The base of our modules: `torch.nn.Module` with a quicker way to its submodules and through them.

PyTorch keeps parameters and submodules in dicts of their own and answers for them in `__getattr__`,
which Python asks last, after a search that fails. That takes as long as a small operation on a CPU,
and a pass of the embedded target asked 287 times. So submodules are plain attributes as well; a
`forward` of a module that owns parameters reads `self._parameters`, which is always up to date.

A call of a module takes PyTorch about as long again, to look for hooks and for compilers that are
not there; here one look suffices.
"""

from typing import Any

from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)


class Module(nn.Module):
    """`nn.Module` whose submodules are plain attributes too; names, state and hooks are PyTorch's.

    Replace a submodule by assignment or `set_submodule`; writing into `_modules` goes unnoticed.
    """

    _parameters: dict[str, Any]  # tensors, and None where a layer may have none

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`; by way of PyTorch where hooks, or `compile`, want to know of it."""
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            or self._compiled_call_impl is not None
        ):
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        submodules = self.__dict__.get("_modules", {})
        if name in submodules:
            self.__dict__[name] = submodules[name]

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)
