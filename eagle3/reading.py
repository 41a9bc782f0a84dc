"""How a draft's files are read where they are silent, ambiguous or wrong.

Nothing in a draft's tensors says which layer its taps count from, how its rotary pairs lie or which
half of its attention input comes first: a wrong guess loads, stays lossless and accepts nothing. So
every such choice is a `Decision` with its reason, and a `Reading` overrides it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from aerie.kernels.rope import Layout

TapConvention = Literal["output_of", "input_to"]  # id i: output of layer i; or input to layer i
InputOrder = Literal["embedding_first", "hidden_first"]
VocabularyMap = Literal["offsets", "target_ids", "membership", "identity"]
HeadSource = Literal["own", "target"]
RopeScaling = Literal["none"]
DraftMultimodal = Literal["merged", "text"]

logger = logging.getLogger("aerie.eagle3")


@dataclass(frozen=True)
class Decision:
    """What was chosen where the files leave a choice, and why."""

    topic: str
    choice: str
    reason: str
    level: int = logging.DEBUG  # of the log line at load

    def __str__(self) -> str:
        return f"{self.topic}: {self.choice} ({self.reason})"


def log_decisions(decisions: tuple[Decision, ...], source: object) -> None:
    """One line for each decision, at its own level."""
    for decision in decisions:
        logger.log(decision.level, "%s: %s", source, decision)


@dataclass(frozen=True)
class Reading:
    """Overrides of what a draft's files say; None leaves it to them. All are keys of the JSON of
    `--speculative-config`.

    `vocabulary_map` says what `d2t` holds: offsets to the draft id (the published format), target
    ids, nothing of use beside `t2d` ("membership"), or nothing at all ("identity"). `lm_head`
    "target" cuts the head out of the target's; "own" insists on one in the file. `rope_scaling`
    "none" leaves out a scaling that an exporter added to a draft trained without. Behind an image a
    draft sees the target's features ("merged", the default) or, trained on text only, the
    placeholders' own embeddings ("text"): `draft_multimodal`.
    """

    tap_ids: tuple[int, ...] | None = None
    tap_convention: TapConvention | None = None
    rotary_layout: Layout | None = None
    norm_before_residual: bool | None = None
    norm_output: bool | None = None
    input_order: InputOrder | None = None
    vocabulary_map: VocabularyMap | None = None
    lm_head: HeadSource | None = None
    draft_multimodal: DraftMultimodal | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            value = getattr(self, key)
            if value is not None and value not in allowed:
                raise ValueError(f"{key}: must be one of {', '.join(allowed)}, got {value!r}")
        for key in ("norm_before_residual", "norm_output"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{key}: must be true or false, got {value!r}")
        ids = self.tap_ids
        if ids is not None and (not ids or any(type(i) is not int for i in ids)):
            raise ValueError(f"tap_ids: must be layer numbers, got {ids!r}")
        if ids is not None and self.tap_convention is None:
            raise ValueError(
                "tap_ids: say what they count with tap_convention, 'output_of' or 'input_to'"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Reading":
        """From JSON values. Raises ValueError naming the key, the rule and the value."""
        ids = values.get("tap_ids")
        if ids is not None and not isinstance(ids, list):
            raise ValueError(f"tap_ids: must be a list of layer numbers, got {ids!r}")
        return cls(**{**values, "tap_ids": None if ids is None else tuple(ids)})

    def as_dict(self) -> dict[str, Any]:
        """The overrides alone, as JSON has them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        shown = {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}
        return {key: value for key, value in shown.items() if value is not None}


CHOICES: dict[str, tuple[str, ...]] = {
    "tap_convention": get_args(TapConvention),
    "rotary_layout": get_args(Layout),
    "input_order": get_args(InputOrder),
    "vocabulary_map": get_args(VocabularyMap),
    "lm_head": get_args(HeadSource),
    "draft_multimodal": get_args(DraftMultimodal),
    "rope_scaling": get_args(RopeScaling),
}
KEYS = tuple(field.name for field in fields(Reading))
AS_WRITTEN = Reading()
