"""The draft's configuration, read once from a `config.json` in any of the formats of `formats`.

Two layer kinds share one wiring. `llama`, which every public Llama 4 draft holds: rotate-half RoPE
and full causal attention. `llama4`, the layer of vLLM's "Eagle3 for Llama 4": interleaved RoPE with
optional QK norm, or NoPE. Neither chunks its attention, whatever the target does.

Tap ids here count inputs (id i = input of target layer i), see `SupportsEagle3` and `conventions`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aerie.eagle3.architectures import LayerKind
from aerie.eagle3.config_fields import ConfigFields, FeatureNorm
from aerie.eagle3.formats import Format, flatten
from aerie.eagle3.reading import AS_WRITTEN, Decision, DraftMultimodal, Reading, TapConvention
from aerie.llama4.attention_config import AttentionSpec, RopeConfig
from aerie.llama4.json_fields import read_config, read_fields


@dataclass(frozen=True)
class Eagle3Config:
    """Everything the draft's modules are built from, and why it was read so."""

    layer_kind: LayerKind
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    attention: AttentionSpec
    rope: RopeConfig
    rms_norm_eps: float
    vocab_size: int
    draft_vocab_size: int
    num_taps: int
    aux_hidden_state_layers: tuple[int, ...] | None  # None: the target's default
    tap_convention: TapConvention | None  # how the file's own ids were read, if it has some
    norm_before_residual: bool
    feature_norm: FeatureNorm  # in front of fc: over the concatenation, or one norm per tap
    norm_output: bool  # the next level gets the normalised state
    logit_scale: float
    attention_window: int | None  # rows that a trained sliding window shows; None: all
    trained_positions: int | None  # what the training saw; longer contexts are allowed
    shares_target_head: bool  # the file says that it has none of its own
    ties_own_head: bool  # without a head in the file, the draft's embedding would be it
    format: Format = "raw"
    reading: Reading = AS_WRITTEN
    decisions: tuple[Decision, ...] = field(default=(), compare=False)

    @property
    def draft_multimodal(self) -> DraftMultimodal:
        """What the draft sees at image placeholders: the target's features or text embeddings."""
        return self.reading.draft_multimodal or "merged"

    @classmethod
    def from_pretrained(
        cls, folder: Path, target_num_layers: int, reading: Reading = AS_WRITTEN
    ) -> "Eagle3Config":
        """Reads `folder/config.json`; the target's depth is where the draft's layer is numbered."""
        return cls.from_hf(read_config(folder), target_num_layers, reading)

    @classmethod
    def from_hf(
        cls, values: Mapping[str, Any], target_num_layers: int, reading: Reading = AS_WRITTEN
    ) -> "Eagle3Config":
        """From the parsed JSON. Raises CheckpointError: a line for each key that is wrong, with
        its value and the rule."""
        reader = ConfigFields(flatten(values), target_num_layers, reading)
        fields = read_fields(reader.readers())
        del fields["supported"]
        return cls(**fields, format=reader.flat.format, reading=reading)
