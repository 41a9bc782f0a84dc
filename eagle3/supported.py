"""What a draft's config may ask for that is not implemented: refused, never read over."""

from aerie.eagle3.formats import MODELOPT_FLAGS, FlatConfig
from aerie.llama4.json_fields import CheckpointError, flag, integer, section, strings

NOT_NULL = ("yoco_global_kv_layer", "yoco_local_kv_layer")  # refused even if 0, a layer's number
SET = ("parallel_drafting", "mlp_bias")


def check_supported(flat: FlatConfig) -> None:
    """Raises CheckpointError with every key that would change the mathematics."""
    values, nested = flat.values, flat.nested
    refused = {key: values[key] for key in NOT_NULL if values.get(key) is not None}
    refused |= {key: flat.get(key) for key in SET if flat.get(key)}
    refused |= {
        key: flat.get(key)
        for key, published in MODELOPT_FLAGS.items()
        if flat.get(key) is not None and flat.get(key) != published
    }
    if not all(flag(part, "use_aux_hidden_state", True) for part in (values, nested)):
        refused["use_aux_hidden_state"] = False
    if values.get("hidden_act", "silu") != "silu":
        refused["hidden_act"] = values["hidden_act"]
    if _is_quantised(flat):
        refused["quantization_config"] = values["quantization_config"]
    problems = []
    if refused:
        problems.append(f"config keys of a draft variant that is not supported: {refused}")
    if integer(values, "num_hidden_layers", 1) != 1:
        problems.append(
            "config key 'num_hidden_layers': an Eagle3 draft has exactly 1 layer here, got "
            f"{values['num_hidden_layers']}; heads with more layers are not implemented"
        )
    if problems:
        raise CheckpointError("\n  ".join(problems))


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
