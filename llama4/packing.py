"""Projections that are one matrix in memory and several tensors in every checkpoint.

Queries, keys and values read the same input, as do gate and up: one launch over the packed rows
reads it once. State dicts keep the names that Hugging Face gives the parts. `Place` says where a
stored tensor goes, so that a loader can write it there without ever joining anything.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerie.kernels.linear import Linear

LEAVES = ("weight", "bias")
Index = tuple[slice | int, ...]


@dataclass(frozen=True)
class Place:
    """The region of a parameter that one stored tensor fills.

    The tensor must have one of `shapes`; `transposed` swaps its last two dimensions on the way.
    """

    parameter: str
    shapes: tuple[tuple[int, ...], ...]
    index: Index = ()
    transposed: bool = False


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

    def places(self, parameters: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Place]]:
        """Every part's name and its rows of the whole."""
        for leaf in LEAVES:
            parameter, first = f"{prefix}{self.whole}.{leaf}", 0
            if parameter not in parameters:
                continue
            for part, rows in self.parts.items():
                shape = (rows, *parameters[parameter].shape[1:])
                place = Place(parameter, (shape,), (slice(first, first + rows),))
                yield f"{prefix}{part}.{leaf}", place
                first += rows

    def _names(self, prefix: str, leaf: str) -> list[str]:
        return [f"{prefix}{part}.{leaf}" for part in self.parts]


class StoredInParts(nn.Module):
    """A module whose parameters are stored under other names, or in pieces."""

    def places(
        self, parameters: Mapping[str, Tensor], prefix: str, names: Collection[str]
    ) -> Iterator[tuple[str, Place]]:
        """The stored tensors, by name, that fill the module's own parameters.

        `parameters` are those of the whole model, this module's start with `prefix`; `names` are
        the tensors that the files hold, where there is more than one way to store a module.
        """
        raise NotImplementedError


class PackedModule(StoredInParts):
    """A module one of whose projections is packed."""

    def __init__(self, packing: Packing) -> None:
        super().__init__()
        self.packing = packing
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_join)

    def places(
        self, parameters: Mapping[str, Tensor], prefix: str, names: Collection[str]
    ) -> Iterator[tuple[str, Place]]:
        return self.packing.places(parameters, prefix)


def _split(module: nn.Module, tensors: dict, prefix: str, metadata: object) -> None:
    assert isinstance(module, PackedModule)
    module.packing.split(tensors, prefix)


def _join(module: nn.Module, tensors: dict, prefix: str, *_: object) -> None:
    assert isinstance(module, PackedModule)
    module.packing.join(tensors, prefix)


def lay_out_for_eager(module: nn.Module) -> None:
    """Moves every linear weight to input-major memory; shapes, names and values stay.

    One row times a cold weight then reads it in order, which MKL does in three quarters of the
    time. The Triton kernels need output-major rows. On meta weights it only sets the strides, in
    which a loader then allocates.
    """
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.weight.data = linear.weight.data.t().contiguous().t()
