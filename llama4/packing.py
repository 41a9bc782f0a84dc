"""Projections that are one matrix in memory and several tensors in every checkpoint.

Queries, keys and values read the same input, as do gate and up: one launch over the packed rows
reads it once. State dicts keep the names that Hugging Face gives the parts. `Place` says where a
stored tensor goes, so that a loader can write it there without ever joining anything.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from aerie.kernels.linear import Linear
from aerie.kernels.module import Module

LEAVES = ("weight", "bias", "weight_scale")
Index = tuple[slice | int, ...]
Role = Literal["value", "codes", "scale"]
SCALES = ("weight_scale", "weight_scale_inv")  # names of one thing: the factor of the codes
K_SCALES, V_SCALES = ("k_scale", "k_proj.k_scale"), ("v_scale", "v_proj.v_scale")  # FP8 caches
KV_SCALES = K_SCALES + V_SCALES
INPUT_SCALES = ("input_scale", "input_scale_ub")  # of activations; linears use a row's own


@dataclass(frozen=True)
class Place:
    """The region of a parameter that one stored tensor fills.

    The tensor must have one of `shapes`; a single number fills the region. `transposed` swaps its
    last two dimensions on the way. A `value` takes the model's dtype, `codes` are FP8, a `scale` is
    float32 and positive; codes name the place of their `scale`. No `parameter`: the tensor is
    checked and left out.
    """

    parameter: str
    shapes: tuple[tuple[int, ...], ...]
    index: Index = ()
    transposed: bool = False
    role: Role = "value"
    scale: "Place | None" = None


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
                sizes = [rows.stop - rows.start for rows in self.rows(whole)]
                tensors |= dict(zip(self._names(prefix, leaf), whole.split(sizes), strict=True))

    def join(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Replaces the parts in `tensors`, if they are all there, by the whole."""
        for leaf in LEAVES:
            names = self._names(prefix, leaf)
            if all(name in tensors for name in names):
                rows = [tensors.pop(name) for name in names]
                tensors[f"{prefix}{self.whole}.{leaf}"] = torch.cat(rows)

    def rows(self, whole: Tensor) -> list[slice]:
        """Each part's rows of a parameter; of block scales, which have fewer, too."""
        unit = sum(self.parts.values()) // whole.shape[0]
        ends = [0, *accumulate(rows // unit for rows in self.parts.values())]
        return [slice(first, last) for first, last in pairwise(ends)]

    def _names(self, prefix: str, leaf: str) -> list[str]:
        return [f"{prefix}{part}.{leaf}" for part in self.parts]


def linear_places(
    parameters: Mapping[str, Tensor], prefix: str, packing: Packing, names: Collection[str]
) -> Iterator[tuple[str, Place]]:
    """Where weights, biases and scales of the parts of one (packed) `Linear` go."""
    whole = f"{prefix}{packing.whole}"
    weight, bias = parameters[f"{whole}.weight"], parameters.get(f"{whole}.bias")
    scale = parameters.get(f"{whole}.weight_scale")
    for number, part in enumerate(packing.parts):
        name, rows = f"{prefix}{part}", packing.rows(weight)[number]
        height = rows.stop - rows.start
        shapes = ((height, *weight.shape[1:]),)
        if bias is not None:
            yield f"{name}.bias", Place(f"{whole}.bias", ((height,),), (rows,))
        if scale is None:
            yield f"{name}.weight", Place(f"{whole}.weight", shapes, (rows,))
            continue
        own = packing.rows(scale)[number]
        factor = Place(f"{whole}.weight_scale", scale_shapes(scale[own]), (own,), role="scale")
        yield f"{name}.weight", Place(f"{whole}.weight", shapes, (rows,), False, "codes", factor)
        yield stored_name(name, SCALES, names), factor
        for leaf in INPUT_SCALES:
            if f"{name}.{leaf}" in names:
                yield f"{name}.{leaf}", Place("", ((1,), ()), role="scale")


def scale_shapes(scale: Tensor) -> tuple[tuple[int, ...], ...]:
    """How the scales of a (part of a) linear may be stored: blocks, or rows, or one for all."""
    if scale.ndim == 2:
        return (tuple(scale.shape),)
    return ((len(scale), 1), (len(scale),), (1,), ())


def stored_name(owner: str, leaves: Sequence[str], names: Collection[str]) -> str:
    """The first of an owner's possible names that the files hold, else the first."""
    choices = [f"{owner}.{leaf}" for leaf in leaves]
    return next((name for name in choices if name in names), choices[0])


class StoredInParts(Module, ABC):
    """A module whose parameters are stored under other names, or in pieces."""

    @abstractmethod
    def places(
        self, parameters: Mapping[str, Tensor], prefix: str, names: Collection[str]
    ) -> Iterator[tuple[str, Place]]:
        """The stored tensors, by name, that fill the module's own parameters.

        `parameters` are those of the whole model, this module's start with `prefix`; `names` are
        the tensors that the files hold, where there is more than one way to store a module.
        """


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
        yield from linear_places(parameters, prefix, self.packing, names)
        for leaf in KV_SCALES if "k_proj" in self.packing.parts else ():
            if f"{prefix}{leaf}" in names:
                yield f"{prefix}{leaf}", Place("", ((1,), ()), role="scale")


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
