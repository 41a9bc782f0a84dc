"""Strict reading of a safetensors folder into a module: every tensor accounted for, both ways.

A draft that loads wrongly stays lossless and merely accepts nothing; a target that loads wrongly is
fluent nonsense. So nothing is skipped, guessed or filled in, and all that is wrong is listed: first
what the headers tell, before anything is allocated, then what the values are. Tensors are read
piece by piece into the place where they stay (`tensor_reading`), and the module is changed only
when all of them are there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from aerie.kernels.backend import DTYPES
from aerie.kernels.linear import Linear
from aerie.kernels.stream_launch import FP8
from aerie.llama4.accounting import differences, fits
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.packing import Packing, Place, StoredInParts, linear_places
from aerie.llama4.safetensors_header import StoredTensor
from aerie.llama4.stored_tensors import MAX_LISTED, stored_tensors
from aerie.llama4.tensor_reading import Copy, log_oddities, read, read_all
from aerie.llama4.weight_memory import empty_like

Progress = Callable[[int, int], None]  # bytes read, bytes in all


@dataclass(frozen=True)
class Renaming:
    """How tensor names of the files become parameter names.

    `prefixes` are replaced at the start of a name (first match). Names in `ignored`, or under one
    of its entries that ends with a dot, are left out on purpose.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def __call__(self, name: str) -> str | None:
        """The parameter's name, or None for a tensor that is left out."""
        folders = tuple(entry for entry in self.ignored if entry.endswith("."))
        if name in self.ignored or name.startswith(folders):
            return None
        for old, new in self.prefixes.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


@dataclass(frozen=True)
class LoadOptions:
    """How weights are read: cast to `dtype`, onto `device`.

    An `optional` tensor that is absent keeps the module's value. FP8 parameters take the files'
    codes and scales as they are or, with `quantize`, are made from unquantised tensors on the way.
    `check_finite` looks at every value; `progress` is told bytes read and bytes in all. With a
    `rank_reader` the module is one rank's part, and only that is read.
    """

    dtype: torch.dtype
    device: torch.device | str
    optional: tuple[str, ...] = ()
    quantize: bool = False
    check_finite: bool = True
    progress: Progress | None = None
    rank_reader: Callable[[Mapping[str, StoredTensor]], Mapping[str, StoredTensor]] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (*DTYPES, torch.float64):
            raise ValueError(
                f"dtype: must be torch.float32, float16, bfloat16 or float64, got {self.dtype!r}"
            )


@torch.inference_mode(False)  # what is read by threads, which have no such mode, serves in either
def load_weights(
    module: nn.Module,
    folder: Path,
    renaming: Callable[[str], str | None],
    options: LoadOptions,
) -> None:
    """Replaces the (meta) parameters of `module` by the folder's tensors.

    They keep the strides of what they replace. Integer buffers such as a vocabulary map become
    int64. Besides the result, the host holds a few megabytes (or one expert) per thread.
    Raises CheckpointError listing all that is wrong, and then the module is as it was.
    """
    found, quantize = renamed(stored_tensors(folder), renaming), options.quantize
    if options.rank_reader is not None:
        found = options.rank_reader(found)
    parameters = dict(_own_tensors(module))
    places = _places(module, parameters, found)
    if quantize:
        places = {name: place for name, place in places.items() if place.role != "scale"}
    places = {n: p for n, p in places.items() if n in found or n not in options.optional}
    problems = differences(parameters, places, found, quantize)
    device = "meta" if problems else options.device
    filled = _allocate(parameters, places, options.dtype, device)
    copies = [
        _copy(name, found[name], place, filled)
        for name, place in places.items()
        if name in found and fits(found[name], place, parameters, quantize)
    ]
    seen = read_all(copies, options.check_finite, options.progress)
    _raise_if([*problems, *seen.problems], folder)
    log_oddities(folder, copies, seen.idle)
    assign(module, filled, options.device)


def check_weights(module: nn.Module, folder: Path, renaming: Callable[[str], str | None]) -> None:
    """Whether `load_weights` would find every tensor in its shape and type; reads headers only.

    Raises CheckpointError listing all that is wrong.
    """
    found = renamed(stored_tensors(folder), renaming)
    parameters = dict(_own_tensors(module))
    places = _places(module, parameters, found)
    _raise_if(differences(parameters, places, found, quantize=False), folder)


def _raise_if(problems: list[str], folder: Path) -> None:
    if problems:
        listed = "\n  ".join(problems[:MAX_LISTED])
        raise CheckpointError(f"{folder}: {len(problems)} tensors are wrong:\n  {listed}")


def planned_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """What loading would fill, on "meta": the types and layouts that the values would have."""
    parameters = dict(_own_tensors(module))
    return _allocate(parameters, _places(module, parameters, {}), dtype, "meta")


def renamed(
    stored: list[StoredTensor], renaming: Callable[[str], str | None]
) -> dict[str, StoredTensor]:
    """The tensors under their parameter names. Raises CheckpointError if two get the same."""
    found: dict[str, StoredTensor] = {}
    for tensor in stored:
        name = renaming(tensor.name)
        if name in found:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} appears twice, as {found[name].name!r} and as "
                f"{tensor.name!r}"
            )
        if name is not None:
            found[name] = tensor
    return found


def read_tensors(folder: Path, renaming: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The folder's tensors under their parameter names, as they are stored, on the CPU."""
    return {name: read(t) for name, t in renamed(stored_tensors(folder), renaming).items()}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a checkpoint fills, each under its first name."""
    yield from module.named_parameters()
    for prefix, owner in module.named_modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _places(
    module: nn.Module, parameters: Mapping[str, Tensor], found: Mapping[str, StoredTensor]
) -> dict[str, Place]:
    """Where every tensor that should be in the files goes."""
    parts: dict[str, Place] = {}
    for name, owner in module.named_modules():
        if isinstance(owner, StoredInParts):
            parts |= dict(owner.places(parameters, f"{name}." if name else "", found))
    filled = {place.parameter for place in parts.values()}
    for name, linear in module.named_modules():
        weight = f"{name}.weight"
        if isinstance(linear, Linear) and weight in parameters and weight not in filled:
            alone = Packing(name, {name: linear.weight.shape[0]})
            parts |= dict(linear_places(parameters, "", alone, found))
    filled = {place.parameter for place in parts.values()}
    whole = {
        name: Place(name, (tuple(tensor.shape),))
        for name, tensor in parameters.items()
        if name not in filled
    }
    return whole | parts


def _allocate(
    parameters: Mapping[str, Tensor],
    places: Mapping[str, Place],
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Room for every parameter that is to be filled; on "meta" only its description."""
    kept = {place.parameter: place.role for place in places.values()}
    kept |= {p.scale.parameter: p.scale.role for p in places.values() if p.scale is not None}

    def room(name: str, tensor: Tensor) -> Tensor:
        own = FP8 if kept[name] == "codes" else torch.float32 if kept[name] == "scale" else dtype
        own = own if tensor.is_floating_point() else torch.int64
        return empty_like(tensor, own, device)

    return {name: room(name, tensor) for name, tensor in parameters.items() if name in kept}


def _copy(name: str, source: StoredTensor, place: Place, filled: Mapping[str, Tensor]) -> Copy:
    if not place.parameter:
        return Copy(name, source, place, torch.empty(source.shape, device="meta"))
    made = place.scale if source.dtype != FP8 else None
    scale = None if made is None else filled[made.parameter][made.index]
    return Copy(name, source, place, filled[place.parameter], scale)


def assign(module: nn.Module, filled: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Puts the tensors in place of the module's own; what two modules share stays shared."""
    tied = _tied(module)
    for name, tensor in filled.items():
        owner, _, leaf = name.rpartition(".")
        is_buffer = leaf in module.get_submodule(owner)._buffers
        value = tensor if is_buffer else nn.Parameter(tensor, requires_grad=False)
        setattr(module.get_submodule(owner), leaf, value)
    for alias, name in tied.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(name))
    module.to(device).eval().requires_grad_(False)


def _tied(module: nn.Module) -> dict[str, str]:
    """Second names of parameters that two modules share, by their first names."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    everything = module.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in everything if name != first[id(p)]}
