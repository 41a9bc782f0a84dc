"""Room for FP8: which projections of a model become codes and scales, before anything is loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from aerie.kernels.linear import Linear
from aerie.llama4.attention import Attention
from aerie.llama4.checkpoint import read_tensors
from aerie.llama4.experts import Experts
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.kv_scales import KVScales
from aerie.llama4.moe import MoE
from aerie.llama4.packing import K_SCALES, KV_SCALES, V_SCALES, PackedModule, stored_name
from aerie.llama4.quantization import Granularity, Group, Quantization
from aerie.llama4.weight_quantization import BLOCK


def hold_fp8(model: nn.Module, quantization: Quantization) -> None:
    """Gives every projection that is FP8 a weight of codes and a scale, both without values.

    Raises CheckpointError where parts of one matrix in memory are not quantised alike.
    """
    for prefix, owner in model.named_modules():
        above = f"{prefix}." if prefix else ""
        if isinstance(owner, Experts):
            group = _common(quantization, [f"{above}0.{part.name}" for part in owner.parts])
            if group is not None:
                width = owner.down_proj.shape[2]
                _check_blocks(
                    group, {f"{above}0.{name}": width for name in ("gate_proj", "up_proj")}
                )
                owner.hold_fp8(group.granularity, group.has_input_scale)
        for leaf, child in owner.named_children():
            if isinstance(child, Linear):
                parts = _parts_of(owner, leaf, child)
                group = _common(quantization, [above + part for part in parts])
                if group is not None:
                    _check_is_no_router(owner, above + leaf, leaf)
                    _check_blocks(group, {above + part: rows for part, rows in parts.items()})
                    child.hold_fp8(_scale_shape(child, group.granularity))


def fp8_modules(model: nn.Module) -> set[str]:
    """What files call the linears that `hold_fp8` gave codes; experts are not among them."""
    return {
        f"{prefix}.{part}" if prefix else part
        for prefix, owner in model.named_modules()
        for leaf, child in owner.named_children()
        if isinstance(child, Linear) and child.weight_scale is not None
        for part in _parts_of(owner, leaf, child)
    }


def take_kv_scales(model: nn.Module, folder: Path, renaming: Callable[[str], str | None]) -> None:
    """Gives every attention the scales of an FP8 cache that the files hold for it.

    Raises CheckpointError where a layer has only one of the two.
    """

    def only_scales(name: str) -> str | None:
        renamed = renaming(name)
        return renamed if renamed is not None and renamed.endswith(KV_SCALES) else None

    found = read_tensors(folder, only_scales)
    for name, attention in model.named_modules():
        if isinstance(attention, Attention):
            pair = [found.get(stored_name(name, leaves, found)) for leaves in (K_SCALES, V_SCALES)]
            k_scale, v_scale = (None if x is None else x.float().view(1) for x in pair)
            if (k_scale is None) != (v_scale is None):
                missing = K_SCALES if k_scale is None else V_SCALES
                raise CheckpointError(
                    f"{folder}: {' or '.join(f'{name}.{leaf}' for leaf in missing)}: missing; "
                    f"k_scale and v_scale must come together"
                )
            if k_scale is not None and v_scale is not None:
                attention.kv_scales = KVScales(k_scale, v_scale)


def _parts_of(owner: nn.Module, leaf: str, linear: Linear) -> Mapping[str, int]:
    """What files call the rows of a projection: q, k and v are modules of their own there."""
    if isinstance(owner, PackedModule) and owner.packing.whole == leaf:
        return owner.packing.parts
    return {leaf: linear.weight.shape[0]}


def _common(quantization: Quantization, parts: list[str]) -> Group | None:
    """How all of `parts` are quantised, if they are."""
    groups = {name: quantization.group(name) for name in parts}
    kinds = {group and (group.granularity, group.has_input_scale) for group in groups.values()}
    if len(kinds) > 1:
        shown = {n: g.granularity if g else "unquantised" for n, g in groups.items()}
        raise CheckpointError(
            f"config key 'quantization_config': parts that are one matrix in memory must be "
            f"quantised alike, got {shown}"
        )
    return groups[parts[0]]


def _check_is_no_router(owner: nn.Module, name: str, leaf: str) -> None:
    if isinstance(owner, MoE) and leaf == "router":
        raise CheckpointError(
            f"config key 'quantization_config': '{name}' must be ignored: routers stay unquantised"
        )


def _check_blocks(group: Group, parts: Mapping[str, int]) -> None:
    ragged = {name: rows for name, rows in parts.items() if rows % BLOCK}
    if group.granularity == "block" and len(parts) > 1 and ragged:
        raise CheckpointError(
            f"config key 'quantization_config': block scales of parts that are one matrix in "
            f"memory need multiples of {BLOCK} rows (on each rank), got {ragged}; scale per "
            f"channel instead"
        )


def _scale_shape(linear: Linear, granularity: Granularity) -> tuple[int, ...]:
    rows, columns = linear.weight.shape
    return (rows,) if granularity == "channel" else (-(-rows // BLOCK), -(-columns // BLOCK))
