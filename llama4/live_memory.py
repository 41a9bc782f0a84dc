"""The most memory that a computation's own tensors take at once, found without computing it.

Run on the meta device, every operation says what it returns and nothing has values: what is alive
after each is added up. Scratch inside an operation, which no caller ever holds, is not seen.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class _Alive:
    storage: StorageWeakRef
    nbytes: int


class LiveMemory(TorchDispatchMode):
    """`with LiveMemory(existing) as live: ...` leaves the peak in bytes in `live.peak`.

    What shares memory with a tensor of `existing` is not counted.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._existing = {tensor.untyped_storage()._cdata for tensor in existing}
        self._alive: dict[int, _Alive] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {k: a for k, a in self._alive.items() if not a.storage.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._existing and key not in self._alive:
                    self._alive[key] = _Alive(StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(alive.nbytes for alive in self._alive.values()))
        return result
