"""What a checkpoint says of its quantised weights: which modules are FP8, and how they are scaled.

Four families of files hold Llama 4 in FP8 (e4m3). What stays unquantised is each file's own list:

    compressed-tensors  `weight_scale` per tensor, channel or 128 x 128 block, experts one by one
    fbgemm_fp8          per channel; fused experts with `gate_up_proj_scale`, `down_proj_scale`
    modelopt            per tensor; fused experts with `gate_up_proj_weight_scale`, ...
    fp8                 `weight_scale_inv` per 128 x 128 block, or `weight_scale` per tensor

Everything else is refused by name: no value here is a guess that a loader could get wrong quietly,
as the types of the stored tensors must agree with it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from aerie.llama4.json_fields import CheckpointError, read_json, section, strings

BLOCK = 128  # rows and columns of a block
Granularity = Literal["channel", "block"]  # of scales in memory: one per tensor fills its rows
Quantize = Literal["fp8", "fp8_block"]
KEY, MODELOPT_FILE = "quantization_config", "hf_quant_config.json"
SUPPORTED = (
    "supported are FP8 (e4m3) weights of compressed-tensors, fbgemm_fp8, modelopt and fp8, "
    f"scaled per tensor, channel or {BLOCK} x {BLOCK} block"
)
FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors
MAX_PATTERN, MAX_REPEATS = 300, 3  # of a regular expression: a checkpoint must not stall a loader


@dataclass(frozen=True)
class Group:
    """Modules that are scaled alike. `targets` name them, or are "Linear": all of them."""

    targets: tuple[str, ...]
    granularity: Granularity
    has_input_scale: bool  # static activation scales


@dataclass(frozen=True)
class Quantization:
    """Which modules are FP8: those of a group's targets, but for the ignored."""

    method: str
    groups: tuple[Group, ...]
    ignored: tuple[str, ...]

    def group(self, module: str) -> Group | None:
        """How the projection named `module` (as in text-only checkpoints) is quantised, if it is.

        Entries name a module, what lies above it, or its last parts; files write them with and
        without the prefix of the multimodal model.
        """
        names = _names(module)
        if any(_matches(entry, names) for entry in self.ignored):
            return None
        for group in self.groups:
            if "Linear" in group.targets or any(_matches(t, names) for t in group.targets):
                return group
        return None


def read_quantization(folder: Path) -> Quantization | None:
    """From the folder's `config.json`, else ModelOpt's own file; None if it is not quantised.

    Raises CheckpointError naming what is not supported, and what is.
    """
    values = read_json(folder / "config.json")
    for part in (values, section(values, "text_config")):
        if part.get(KEY) is not None:
            return quantization(section(part, KEY))
    file = folder / MODELOPT_FILE
    if not file.is_file():
        return None
    own = section(read_json(file), "quantization")
    return (
        None if own.get("quant_algo") is None else quantization({"quant_method": "modelopt", **own})
    )


def quantized_on_load(
    folder: Path, stored: Quantization | None, quantize: Quantize, linears: bool
) -> Quantization:
    """What this package quantises itself: the experts, or all projections but router and head."""
    if quantize not in get_args(Quantize):
        raise ValueError(f"quantize: must be one of {get_args(Quantize)} or None, got {quantize!r}")
    if stored is not None:
        raise CheckpointError(
            f"{folder}: is quantised already ({stored.method}); load it without quantize"
        )
    targets = ("Linear",) if linears else ("re:.*[.]experts[.]",)
    group = Group(targets, "channel" if quantize == "fp8" else "block", False)
    return Quantization("aerie", (group,), ("router", "lm_head"))


def quantization(values: Mapping[str, Any]) -> Quantization | None:
    """From a parsed `quantization_config`. Raises CheckpointError."""
    method = values.get("quant_method")
    readers = {
        "compressed-tensors": _compressed_tensors,
        "fbgemm_fp8": _fbgemm,
        "modelopt": _modelopt,
        "fp8": _fp8,
    }
    if not isinstance(method, str) or method not in readers:
        raise _unsupported("quant_method", method)
    return readers[method](values)


def _compressed_tensors(values: Mapping[str, Any]) -> Quantization:
    groups = section(values, "config_groups")
    if not groups:
        raise CheckpointError(f"config key '{KEY}': 'config_groups' must name a group")
    if section(values, "sparsity_config").get("format", "dense") != "dense":
        raise _unsupported("sparsity_config", values["sparsity_config"])
    if section(values, "transform_config").get("config_groups"):
        raise _unsupported("transform_config", "weights in a rotated basis")
    named = [section(groups, name) for name in groups]
    for part in (values, *named):
        if part.get("format") not in (None, *FORMATS, "mixed-precision"):
            raise _unsupported("format", part["format"])
    return Quantization("compressed-tensors", tuple(map(_group, named)), strings(values, "ignore"))


def _group(values: Mapping[str, Any]) -> Group:
    weights, inputs = section(values, "weights"), section(values, "input_activations")
    for name, part in (("weights", weights), ("input_activations", inputs)):
        if name == "weights" or part:
            _check_is_fp8(name, part)
    if values.get("output_activations") is not None:
        raise _unsupported("output_activations", values["output_activations"])
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    if strategy not in ("tensor", "channel", "block"):
        raise _unsupported("weights.strategy", strategy)
    if strategy == "block" and block != [BLOCK, BLOCK]:
        raise _unsupported("weights.block_structure", block)
    granularity = "block" if strategy == "block" else "channel"
    is_static = bool(inputs) and not inputs.get("dynamic", False)
    return Group(strings(values, "targets"), granularity, is_static)


def _check_is_fp8(name: str, values: Mapping[str, Any]) -> None:
    kind = {key: values.get(key) for key in ("type", "num_bits", "symmetric")}
    if kind["type"] != "float" or kind["num_bits"] != 8 or kind["symmetric"] is False:
        raise _unsupported(name, kind)


def _fbgemm(values: Mapping[str, Any]) -> Quantization:
    group = Group(("Linear",), "channel", False)
    return Quantization("fbgemm_fp8", (group,), strings(values, "modules_to_not_convert"))


def _modelopt(values: Mapping[str, Any]) -> Quantization:
    algorithm = values.get("quant_algo")
    if algorithm != "FP8":
        raise _unsupported("quant_algo", algorithm)
    ignored = strings(values, "exclude_modules") + strings(values, "ignore")
    return Quantization("modelopt", (Group(("Linear",), "channel", True),), ignored)


def _fp8(values: Mapping[str, Any]) -> Quantization:
    block = values.get("weight_block_size")
    if block not in (None, [BLOCK, BLOCK]):
        raise _unsupported("weight_block_size", block)
    for key, usual in (("fmt", "e4m3"), ("scale_fmt", "float"), ("expert_dtype", "fp8")):
        if values.get(key, usual) != usual:
            raise _unsupported(key, values[key])
    scheme = values.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _unsupported("activation_scheme", scheme)
    ignored = strings(values, "modules_to_not_convert") + strings(values, "ignored_layers")
    granularity = "channel" if block is None else "block"
    return Quantization("fp8", (Group(("Linear",), granularity, scheme == "static"),), ignored)


def _unsupported(key: str, value: object) -> CheckpointError:
    return CheckpointError(f"config key '{KEY}': {key} {value!r:.200} is not read; {SUPPORTED}")


def _names(module: str) -> tuple[str, ...]:
    """The module and what lies above it, with each prefix that files have."""
    parts = module.split(".")
    own = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return tuple(prefix + name for name in own for prefix in ("", "language_model.", "model."))


def _matches(entry: str, names: tuple[str, ...]) -> bool:
    """A name or its end, a glob, or `re:` and a regular expression that fits from the start."""
    if entry.startswith("re:"):
        pattern = _pattern(entry.removeprefix("re:"))
        return any(pattern.match(name) for name in names[:3])
    if "*" in entry:
        pattern = _pattern(re.escape(entry).replace(r"\*", ".*"))
        return any(pattern.fullmatch(name) for name in names)
    return any(name == entry or name.endswith(f".{entry}") for name in names)


def _pattern(text: str) -> re.Pattern[str]:
    """Refuses what could run for years on a short name: repeats of repeats, and many of them."""
    repeats = len(re.findall(r"[*+{]", text))
    if len(text) > MAX_PATTERN or repeats > MAX_REPEATS or re.search(r"\)[*+{?]", text):
        raise CheckpointError(
            f"config key '{KEY}': the pattern {text!r:.100} is longer than {MAX_PATTERN}, repeats "
            f"more than {MAX_REPEATS} times or repeats a group; name the modules instead"
        )
    try:
        return re.compile(text)
    except re.error as error:
        raise CheckpointError(
            f"config key '{KEY}': {text!r} is no regular expression ({error})"
        ) from error
