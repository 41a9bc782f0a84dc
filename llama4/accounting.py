"""Does every tensor of the files have its place? Told by their headers, before allocating.

Missing and unexpected names, wrong shapes and types, each as a sentence with the file, what was
found, what is expected and, where the bytes give it away, the usual cause.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from aerie.kernels.stream_launch import FP8
from aerie.llama4.packing import Place
from aerie.llama4.safetensors_header import StoredTensor

READABLE = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.int32, torch.int64)


def differences(
    parameters: Mapping[str, Tensor],
    places: Mapping[str, Place],
    found: Mapping[str, StoredTensor],
    quantize: bool,
) -> list[str]:
    missing = [
        f"{name}: missing{_scale_hint(name, places)}" for name in places if name not in found
    ]
    extra = [
        f"{name}: unexpected{_origin(name, tensor)}{_format_hint(name)}"
        for name, tensor in found.items()
        if name not in places
    ]
    both = [(name, found[name], place) for name, place in places.items() if name in found]
    shapes = [
        f"{name}: shape {tensor.shape}, expected {' or '.join(map(str, place.shapes))}"
        f"{_origin(name, tensor)}{_looks_transposed(tensor, place)}"
        for name, tensor, place in both
        if tensor.shape not in place.shapes
    ]
    kinds = [
        f"{name}: {tensor.shown_dtype}, expected {_kind(allowed)}"
        f"{_origin(name, tensor)}{_list_hint(tensor, allowed)}"
        for name, tensor, place in both
        if tensor.dtype not in (allowed := _allowed(place, parameters, quantize))
    ]
    return missing + extra + shapes + kinds


def _scale_hint(name: str, places: Mapping[str, Place]) -> str:
    is_scale = places[name].role == "scale"
    return "; FP8 codes mean nothing without their scale" if is_scale else ""


def _format_hint(name: str) -> str:
    is_scale = name.endswith(("scale", "scale_inv", "scale_ub"))
    return "; no FP8 weight takes it, says the quantization_config" if is_scale else ""


def _list_hint(tensor: StoredTensor, allowed: tuple[torch.dtype, ...]) -> str:
    if tensor.dtype == FP8:
        return "; the quantization_config does not list it as FP8"
    return "; the quantization_config lists it as FP8" if allowed == (FP8,) else ""


def _origin(name: str, tensor: StoredTensor) -> str:
    stored = "" if tensor.name == name else f" as {tensor.name!r}"
    return f" [{tensor.file.name}{stored}]"


def _looks_transposed(tensor: StoredTensor, place: Place) -> str:
    swapped = (*tensor.shape[:-2], *reversed(tensor.shape[-2:]))
    return "; it looks transposed" if swapped in place.shapes else ""


def fits(
    tensor: StoredTensor, place: Place, parameters: Mapping[str, Tensor], quantize: bool
) -> bool:
    is_allowed = tensor.dtype in _allowed(place, parameters, quantize)
    return tensor.shape in place.shapes and is_allowed


def _allowed(
    place: Place, parameters: Mapping[str, Tensor], quantize: bool
) -> tuple[torch.dtype, ...]:
    """The types that a tensor for this place may be stored in."""
    if place.role == "codes" and not quantize:
        return (FP8,)
    is_whole = place.role == "value" and not parameters[place.parameter].is_floating_point()
    return INTEGERS if is_whole else READABLE


def _kind(allowed: tuple[torch.dtype, ...]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
    return f"{', '.join(first)} or {last}" if first else last
