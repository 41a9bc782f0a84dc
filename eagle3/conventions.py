"""What a draft's tap ids, norms and rotary pairs mean, decided once and with a reason.

One tap has two names: the *output of* layer i is the *input to* layer i + 1. Producers write the
one or the other under the same key (SpecForge's 1, N/2 - 1, N - 4 and the speculators library's
2, N/2, N - 3 are the same taps), so who wrote the file decides. Inside this package ids are inputs.
"""

import logging
from dataclasses import dataclass

from aerie.eagle3.formats import FlatConfig
from aerie.eagle3.reading import Decision, Reading, TapConvention
from aerie.kernels.rope import Layout
from aerie.llama4.json_fields import CheckpointError, flag, integers, number, section

TAP_KEY = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Taps:
    """`inputs` are the tapped layers by their inputs; None: the target's default, and then there
    are no ids with a `convention` either."""

    inputs: tuple[int, ...] | None
    decision: Decision
    convention: TapConvention | None = None


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """Inputs of an early, a middle and a late layer, as the published heads were trained."""
    return (2, num_layers // 2, num_layers - 3)


def show_taps(inputs: tuple[int, ...]) -> str:
    """Both names of the same taps."""
    outputs = ", ".join("embeddings" if i == 0 else str(i - 1) for i in inputs)
    return f"inputs to layers {', '.join(map(str, inputs))} = outputs of layers {outputs}"


def read_taps(flat: FlatConfig, reading: Reading, num_layers: int) -> Taps:
    """The taps of a draft for a target of `num_layers` layers."""
    origin, ids = "the override", reading.tap_ids
    if ids is None:
        top, nested = integers(flat.values, TAP_KEY), integers(flat.nested, TAP_KEY)
        origin, ids = (f"config key '{TAP_KEY}'", top) if top else ("eagle_config", nested)
    if not ids:
        inputs = default_taps(num_layers)
        shown = show_taps(inputs)
        return Taps(None, Decision("taps", shown, "the default: the config names none"))
    convention, reason = _convention(flat, reading, ids, num_layers)
    inputs = ids if convention == "input_to" else tuple(i + 1 for i in ids)
    written = f"{list(ids)} from {origin}, read as '{convention}': {reason}"
    return Taps(inputs, Decision("taps", show_taps(inputs), written, logging.INFO), convention)


def _convention(
    flat: FlatConfig, reading: Reading, ids: tuple[int, ...], num_layers: int
) -> tuple[TapConvention, str]:
    if reading.tap_convention is not None:
        return reading.tap_convention, "the override says so"
    if flat.format != "speculators":
        return "output_of", f"that is what {flat.producer} writes"
    if flat.producer.endswith("trained by it"):
        return "input_to", "that is what the speculators library trains with"
    if set(ids) == set(default_taps(num_layers)):
        return "input_to", "these are the speculators library's own defaults"
    return "output_of", "converted heads keep the ids of SpecForge or ModelOpt"


def read_norm_before_residual(flat: FlatConfig, reading: Reading) -> bool:
    """Whether the residual starts from the normalised hidden state."""
    if reading.norm_before_residual is not None:
        return reading.norm_before_residual
    return either(flat, "norm_before_residual")


@dataclass(frozen=True)
class NormOutput:
    """Whether the next level gets the normalised state; a decision where the file is doubtful."""

    value: bool
    decisions: tuple[Decision, ...] = ()


def read_norm_output(flat: FlatConfig, reading: Reading) -> NormOutput:
    """`norm_output`, a key with two meanings: SpecForge wrote it for the norm before lm_head."""
    if reading.norm_output is not None:
        return NormOutput(reading.norm_output)
    written = either(flat, "norm_output")
    if not written or flat.format == "speculators" or either(flat, "fc_norm"):
        return NormOutput(written)
    reason = (
        "the file says true, but without fc_norm (EAGLE-3.1) SpecForge wrote that for the norm in "
        "front of lm_head; override with norm_output if it was trained so"
    )
    return NormOutput(False, (Decision("norm_output", "false", reason, logging.WARNING),))


def rotary_layout(is_llama4: bool, reading: Reading) -> Layout:
    """How the pairs that RoPE turns lie in a head."""
    return reading.rotary_layout or ("interleaved" if is_llama4 else "half")


def rope_decisions(flat: FlatConfig, theta: float) -> tuple[Decision, ...]:
    """Where the rotary base came from: files valid for one transformers are silent for another."""
    values = flat.values
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    nested, top = section(values, key).get("rope_theta"), values.get("rope_theta")
    if nested is None and top is None:
        reason = "the config names none; this is what such drafts were trained with"
        return (Decision("rope_theta", f"{theta:g}", reason, logging.INFO),)
    if nested is not None and top is not None and theta != number(values, "rope_theta"):
        reason = f"from {key}, while the top level says {top:g}"
        return (Decision("rope_theta", f"{theta:g}", reason, logging.WARNING),)
    return (Decision("rope_theta", f"{theta:g}", "the top level" if nested is None else key),)


def either(flat: FlatConfig, key: str) -> bool:
    """A flag at the top level or in `eagle_config`. Raises CheckpointError if they contradict."""
    found = [
        flag(part, key, False) for part in (flat.values, flat.nested) if part.get(key) is not None
    ]
    if len(set(found)) > 1:
        raise CheckpointError(f"config key {key!r}: the top level and eagle_config contradict")
    return any(found)
