"""What a draft's tap ids, norms and rotary pairs mean, decided once and with a reason.

One tap has two names: the *output of* layer i is the *input to* layer i + 1. Producers write the
one or the other under the same key (SpecForge's 1, N/2 - 1, N - 4 and the speculators library's
2, N/2, N - 3 are the same taps), so who wrote the file decides, and where the ids themselves tell
(sglang#25454 found both kinds among raw files), they do. Inside this package ids are inputs.
"""

import logging
from dataclasses import dataclass

from aerie.eagle3.formats import FlatConfig
from aerie.eagle3.reading import Decision, Reading, TapConvention
from aerie.kernels.rope import Layout
from aerie.llama4.json_fields import CheckpointError, flag, integers, number, section
from aerie.llama4.yarn import YarnScaling

TAP_KEY = "eagle_aux_hidden_state_layer_ids"
ANGELSLIM_KEY = "aux_hidden_states_layer_ids"  # what AngelSlim trains by: outputs of these layers


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
        origin, ids = _written_ids(flat)
    if not ids:
        inputs = default_taps(num_layers)
        shown = show_taps(inputs)
        return Taps(None, Decision("taps", shown, "the default: the config names none"))
    read = _convention(flat, reading, ids, num_layers)
    inputs = ids if read.convention == "input_to" else tuple(i + 1 for i in ids)
    written = f"{list(ids)} from {origin}, read as '{read.convention}': {read.reason}"
    return Taps(inputs, Decision("taps", show_taps(inputs), written, read.level), read.convention)


def _written_ids(flat: FlatConfig) -> tuple[str, tuple[int, ...]]:
    """The file's ids and where they stand; none if it names none."""
    places = (
        (f"config key '{TAP_KEY}'", flat.values, TAP_KEY),
        ("eagle_config", flat.nested, TAP_KEY),
        (f"config key '{ANGELSLIM_KEY}'", flat.values, ANGELSLIM_KEY),
    )
    found = ((origin, integers(values, key)) for origin, values, key in places)
    return next(((origin, ids) for origin, ids in found if ids), ("", ()))


@dataclass(frozen=True)
class _Convention:
    convention: TapConvention
    reason: str
    level: int = logging.INFO


def _convention(
    flat: FlatConfig, reading: Reading, ids: tuple[int, ...], num_layers: int
) -> _Convention:
    if reading.tap_convention is not None:
        return _Convention(reading.tap_convention, "the override says so")
    if flat.producer.endswith("trained by it"):
        return _Convention("input_to", "that is what the speculators library trains with")
    if num_layers in ids:  # nvidia/gpt-oss-120b-Eagle3-v3: 24, 30, 36 of 36 (sglang#32334)
        reason = f"layers are numbered up to {num_layers - 1}, so {num_layers} is no layer's output"
        return _Convention("input_to", reason)
    outputs = integers(flat.values, ANGELSLIM_KEY)
    if outputs:
        return _angelslim(ids, outputs)
    if flat.format == "ModelOpt":
        return _Convention("output_of", f"that is what {flat.producer} writes")
    if set(ids) == set(default_taps(num_layers)):
        reason = "these are the defaults of EAGLE and the speculators library, which count inputs"
        return _Convention("input_to", reason)
    if flat.format == "speculators":
        return _Convention("output_of", "converted heads keep the ids of SpecForge or ModelOpt")
    reason = f"that is what {flat.producer} writes"
    if min(ids) == 1:
        return _Convention("output_of", reason)
    doubt = "; but SGLang and vLLM read ids that do not begin with 1 as inputs: `aerie probe` tells"
    return _Convention("output_of", reason + doubt, logging.WARNING)


def _angelslim(ids: tuple[int, ...], outputs: tuple[int, ...]) -> _Convention:
    """AngelSlim's files may name the same taps twice, for its trainer and, as inputs, for vLLM."""
    if ids == outputs:
        return _Convention("output_of", "that is what AngelSlim trains with")
    if ids == tuple(i + 1 for i in outputs):
        reason = f"they are the layers after {list(outputs)}, AngelSlim's '{ANGELSLIM_KEY}'"
        return _Convention("input_to", reason)
    raise CheckpointError(
        f"config keys '{TAP_KEY}' and '{ANGELSLIM_KEY}': {list(ids)} and {list(outputs)} name "
        f"different layers (the first must be the second, or each one more); say which with "
        f"tap_ids and tap_convention"
    )


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
    if flat.format == "raw" and flat.get("norm_output") is False:
        reason = (
            "as the file says; SpecForge before September 2026 (#879) wrote that for a head that "
            "reads the state without a norm, which is not implemented"
        )
        return NormOutput(False, (Decision("norm_output", "false", reason, logging.INFO),))
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


def yarn_decisions(
    flat: FlatConfig, yarn: YarnScaling | None, score_factor: float
) -> tuple[Decision, ...]:
    """ModelOpt trains without YaRN and exports with it; the file is followed, as by servers."""
    if yarn is None:
        return ()
    choice = f"yarn, {yarn.factor:g} times {yarn.original_max_position_embeddings} positions"
    reason = f"scores times {score_factor:.3g}"
    if flat.format == "ModelOpt":
        reason += "; its exporter adds that to drafts trained without: `aerie probe` tells"
    return (Decision("rope scaling", choice, reason, logging.INFO),)


def either(flat: FlatConfig, key: str) -> bool:
    """A flag at the top level or in `eagle_config`. Raises CheckpointError if they contradict."""
    found = [
        flag(part, key, False) for part in (flat.values, flat.nested) if part.get(key) is not None
    ]
    if len(set(found)) > 1:
        raise CheckpointError(f"config key {key!r}: the top level and eagle_config contradict")
    return any(found)
