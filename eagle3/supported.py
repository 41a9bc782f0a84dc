"""What a draft's config may ask for that is not implemented: refused, never read over."""

from aerie.eagle3.formats import MODELOPT_FLAGS, FlatConfig
from aerie.llama4.json_fields import CheckpointError, flag, integer, section, strings

NOT_NULL = ("yoco_global_kv_layer", "yoco_local_kv_layer")  # refused even if 0, a layer's number
# the only value of each that is implemented; an absent key means it
IMPLEMENTED: dict[str, object] = {**MODELOPT_FLAGS, "parallel_drafting": False, "mlp_bias": False}


def check_supported(flat: FlatConfig) -> None:
    """Raises CheckpointError with every key that would change the mathematics."""
    values, nested = flat.values, flat.nested
    problems = [_variant(key, values[key], None) for key in NOT_NULL if values.get(key) is not None]
    problems += [
        _variant(key, flat.get(key), published)
        for key, published in IMPLEMENTED.items()
        if flat.get(key) is not None and flat.get(key) != published
    ]
    if not all(flag(part, "use_aux_hidden_state", True) for part in (values, nested)):
        problems.append(_variant("use_aux_hidden_state", False, True))
    if values.get("hidden_act", "silu") != "silu":
        problems.append(_variant("hidden_act", values["hidden_act"], "silu"))
    if _is_quantised(flat):
        problems.append(_variant("quantization_config", values["quantization_config"], None))
    if integer(values, "num_hidden_layers", 1) != 1:
        problems.append(
            "config key 'num_hidden_layers': an Eagle3 draft has exactly 1 layer here, got "
            f"{values['num_hidden_layers']}; heads with more layers are not implemented"
        )
    if problems:
        raise CheckpointError("\n  ".join(problems))


def _variant(key: str, value: object, supported: object) -> str:
    return (
        f"config key {key!r}: {value!r:.200} is a draft of another kind, which is not implemented; "
        f"supported is {supported!r}"
    )


def attention_window(flat: FlatConfig) -> int | None:
    """Rows that the draft's layer was trained to see; None: all earlier ones."""
    kinds = strings(flat.values, "layer_types")
    window = flat.values.get("sliding_window")
    if kinds and "sliding_attention" not in kinds:
        return None
    if not kinds and (window is None or not flag(flat.values, "use_sliding_window", True)):
        return None  # SpecForge's templates made from Qwen's configs name a window, switched off
    return integer(flat.values, "sliding_window")


def _is_quantised(flat: FlatConfig) -> bool:
    """ModelOpt ships a quantisation section with a null algorithm where nothing is quantised."""
    found = section(flat.values, "quantization_config")
    inner = section(found, "quantization") or found
    return bool(found) and not ("quant_algo" in inner and inner["quant_algo"] is None)
