"""The routed experts' weights: one matrix per product in memory, in files fused or one by one.

    unquantised, fused   `gate_up_proj` [E, D, 2F], gate columns first, `down_proj` [E, F, D]
    FP8, fused           the same, with `gate_up_proj_scale` (fbgemm) or `_weight_scale` (ModelOpt)
    one by one           `{e}.gate_proj.weight` [F, D], `{e}.up_proj...`, `{e}.down_proj...` [D, F]

Parameters are [E, 2F, D] and [E, D, F] (`kernels/expert_matrix.py`).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend
from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.stream_launch import FP8
from aerie.llama4.config import Llama4Config
from aerie.llama4.packing import SCALES, Place, StoredInParts, stored_name
from aerie.llama4.quantization import Granularity
from aerie.llama4.sharding import WHOLE, Shard
from aerie.llama4.weight_quantization import BLOCK

FUSED_SCALES = ("scale", "weight_scale")
WHOLES = ("gate_up_proj", "down_proj")


class Part(NamedTuple):
    """One expert's projection in files: its rows of a whole, and which of its input scales."""

    name: str
    whole: str
    rows: slice
    number: int


class Experts(StoredInParts):
    """Weights, and for FP8 their scales; `gate_up` and `down` are what the ops take.

    The kernels stream output-major rows. For the eager backend unquantised weights lie input-major,
    as files have them: few rows times cold weights then read them in order (`lay_out_for_eager`).
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_proj_scale: nn.Parameter | None
    down_proj_scale: nn.Parameter | None
    gate_up_proj_input_scale: nn.Parameter | None  # [E, 2]: files may have one of gate and of up
    down_proj_input_scale: nn.Parameter | None  # [E, 1]

    def __init__(
        self, config: Llama4Config, backend: ResolvedBackend, shard: Shard = WHOLE
    ) -> None:
        super().__init__()
        own = shard.experts(config.num_local_experts)
        E, D, F = len(own), config.hidden_size, shard.expert_width(config.intermediate_size)
        self.first_expert = own.start  # of those that are here
        gate_up, down = torch.empty(E, 2 * F, D), torch.empty(E, D, F)
        if backend == "eager":
            gate_up, down = (weight.mT.contiguous().mT for weight in (gate_up, down))
        self.gate_up_proj, self.down_proj = _parameter(gate_up), _parameter(down)
        for whole in WHOLES:
            self.register_parameter(f"{whole}_scale", None)
            self.register_parameter(f"{whole}_input_scale", None)
        self.parts = (
            Part("gate_proj", "gate_up_proj", slice(0, F), 0),
            Part("up_proj", "gate_up_proj", slice(F, 2 * F), 1),
            Part("down_proj", "down_proj", slice(0, D), 0),
        )
        self._matrices: dict[str, ExpertMatrix] = {}
        self.register_state_dict_post_hook(_transpose)
        self.register_load_state_dict_pre_hook(_transpose)

    @property
    def is_fp8(self) -> bool:
        return self.gate_up_proj.dtype == FP8

    @property
    def gate_up(self) -> ExpertMatrix:
        scales = self._parameters["gate_up_proj_input_scale"]  # one quantisation serves both
        matrix = self._matrix("gate_up_proj")
        return matrix if scales is None else replace(matrix, input_scale=scales.amax(1))

    @property
    def down(self) -> ExpertMatrix:
        scales = self._parameters["down_proj_input_scale"]
        matrix = self._matrix("down_proj")
        return matrix if scales is None else replace(matrix, input_scale=scales[:, 0])

    def _matrix(self, whole: str) -> ExpertMatrix:
        """Built again only when a parameter is replaced: every layer asks three times a pass."""
        weight, scale = self._parameters[whole], self._parameters[f"{whole}_scale"]
        assert weight is not None
        kept = self._matrices.get(whole)
        if kept is None or kept.weight is not weight or kept.scale is not scale:
            kept = self._matrices[whole] = ExpertMatrix(weight, scale)
        return kept

    def hold_fp8(self, granularity: Granularity, has_input_scale: bool) -> None:
        """Makes the weights FP8, contiguous, with scales; nothing has values yet."""
        for whole in WHOLES:
            weight = getattr(self, whole)
            codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
            E, N, K = weight.shape
            blocks = (E, -(-N // BLOCK), -(-K // BLOCK))
            shape = blocks if granularity == "block" else (E, N, 1)
            setattr(self, whole, _parameter(codes))
            setattr(self, f"{whole}_scale", _parameter(codes.new_empty(shape, dtype=torch.float32)))
            if has_input_scale:
                inputs = 2 if whole == "gate_up_proj" else 1
                empty = codes.new_empty(E, inputs, dtype=torch.float32)
                setattr(self, f"{whole}_input_scale", _parameter(empty))

    def places(
        self, parameters: Mapping[str, Tensor], prefix: str, names: Collection[str]
    ) -> Iterator[tuple[str, Place]]:
        first = self.first_expert
        experts = range(first, first + len(self.gate_up_proj))
        separate = any(f"{prefix}{e}.{p.name}.weight" in names for e in experts for p in self.parts)
        return (
            self._separate_places(prefix, names) if separate else self._fused_places(prefix, names)
        )

    def _separate_places(self, prefix: str, names: Collection[str]) -> Iterator[tuple[str, Place]]:
        for e in range(len(self.gate_up_proj)):
            for part in self.parts:
                name = f"{prefix}{self.first_expert + e}.{part.name}"
                whole = f"{prefix}{part.whole}"
                shape = tuple(getattr(self, part.whole)[e, part.rows].shape)
                if not self.is_fp8:
                    yield f"{name}.weight", Place(whole, (shape,), (e, part.rows))
                    continue
                scale = self._scale_place(prefix, e, part)
                yield (
                    f"{name}.weight",
                    Place(whole, (shape,), (e, part.rows), False, "codes", scale),
                )
                yield stored_name(name, SCALES, names), scale
                if getattr(self, f"{part.whole}_input_scale") is not None:
                    index = (e, slice(part.number, part.number + 1))
                    place = Place(f"{whole}_input_scale", ((1,), ()), index, role="scale")
                    yield f"{name}.input_scale", place

    def _scale_place(self, prefix: str, e: int, part: Part) -> Place:
        scale = getattr(self, f"{part.whole}_scale")
        unit = 1 if scale.shape[1] == getattr(self, part.whole).shape[1] else BLOCK
        rows = slice(part.rows.start // unit, -(-part.rows.stop // unit))
        shape = tuple(scale[e, rows].shape)
        shapes = (shape,) if unit == BLOCK else (shape, shape[:1], (1,), ())
        return Place(f"{prefix}{part.whole}_scale", shapes, (e, rows), role="scale")

    def _fused_places(self, prefix: str, names: Collection[str]) -> Iterator[tuple[str, Place]]:
        for whole in WHOLES:
            E, N, K = getattr(self, whole).shape
            shapes = ((E, K, N),)
            if not self.is_fp8:
                yield f"{prefix}{whole}", Place(f"{prefix}{whole}", shapes, transposed=True)
                continue
            stored = ((E, 1, N), (E, N, 1), (E,), (1,), ())
            scale = Place(f"{prefix}{whole}_scale", stored, role="scale")
            yield (
                f"{prefix}{whole}",
                Place(f"{prefix}{whole}", shapes, (), True, "codes", scale),
            )
            yield self._fused_scale_name(prefix, whole, names), scale
            if getattr(self, f"{whole}_input_scale") is not None:
                place = Place(f"{prefix}{whole}_input_scale", ((E,), (1,), ()), role="scale")
                yield f"{prefix}{whole}_input_scale", place

    def _fused_scale_name(self, prefix: str, whole: str, names: Collection[str]) -> str:
        """No file has block scales of fused experts: then one expert's scale is asked for."""
        scale, weight = getattr(self, f"{whole}_scale"), getattr(self, whole)
        if scale.shape[1] != weight.shape[1]:
            return f"{prefix}{self.first_expert}.{whole.removeprefix('gate_')}.weight_scale"
        return next(
            (n for leaf in FUSED_SCALES if (n := f"{prefix}{whole}_{leaf}") in names),
            f"{prefix}{whole}_{FUSED_SCALES[0]}",
        )


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _transpose(module: nn.Module, tensors: dict, prefix: str, *_: object) -> None:
    """State dicts have the weights as Hugging Face does: input-major."""
    for whole in WHOLES:
        if f"{prefix}{whole}" in tensors:
            tensors[f"{prefix}{whole}"] = tensors[f"{prefix}{whole}"].mT
