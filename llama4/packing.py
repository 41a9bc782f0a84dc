"""Projections that are one matrix in memory and several tensors in every checkpoint.

Queries, keys and values read the same input, as do gate and up: one launch over the packed rows
reads it once. State dicts keep the names that Hugging Face gives the parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerie.kernels.linear import Linear

LEAVES = ("weight", "bias")


@dataclass(frozen=True)
class Packing:
    """`whole` is a submodule of the owner; `parts` are its names in checkpoints and their rows."""

    whole: str
    parts: Mapping[str, int]

    def split(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Replaces the whole in `tensors` by views of its parts."""
        for leaf in LEAVES:
            whole = tensors.pop(f"{prefix}{self.whole}.{leaf}", None)
            if whole is not None:
                rows = whole.split(list(self.parts.values()))
                tensors |= dict(zip(self._names(prefix, leaf), rows, strict=True))

    def join(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Replaces the parts in `tensors`, if they are all there, by the whole."""
        for leaf in LEAVES:
            names = self._names(prefix, leaf)
            if all(name in tensors for name in names):
                rows = [tensors.pop(name) for name in names]
                tensors[f"{prefix}{self.whole}.{leaf}"] = torch.cat(rows)

    def _names(self, prefix: str, leaf: str) -> list[str]:
        return [f"{prefix}{part}.{leaf}" for part in self.parts]


class PackedModule(nn.Module):
    """A module one of whose projections is packed."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing = packing
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_join)


def _split(module: nn.Module, tensors: dict, prefix: str, metadata: object) -> None:
    assert isinstance(module, PackedModule)
    module.packing.split(tensors, prefix)


def _join(module: nn.Module, tensors: dict, prefix: str, *_: object) -> None:
    assert isinstance(module, PackedModule)
    module.packing.join(tensors, prefix)


def join_all(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Packs a whole checkpoint in place, so that no part is alive beside its whole for long."""
    for name, owner in module.named_modules():
        if isinstance(owner, PackedModule):
            owner.packing.join(tensors, f"{name}." if name else "")


def lay_out_for_eager(module: nn.Module) -> None:
    """Moves every linear weight to input-major memory; shapes, names and values stay.

    One row times a cold weight then reads it in order, which MKL does in three quarters of the
    time. The Triton kernels need output-major rows.
    """
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.weight.data = linear.weight.data.t().contiguous().t()
