"""The speculative configuration: the keys of vLLM's `--speculative-config`, checked at the door."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from aerie.eagle3.batch_costs import BatchCosts, costs_from_dict
from aerie.eagle3.cost_aware import CostAware
from aerie.eagle3.cost_measurement import measured_costs
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.parallel_draft import RemoteDraft
from aerie.eagle3.policies import Chain, DynamicTree, Policy, StaticTree, Verification
from aerie.eagle3.reading import AS_WRITTEN, KEYS, Reading
from aerie.eagle3.width import RoundCosts
from aerie.llama4.model import Llama4ForCausalLM

MEASURED = "measured"


@dataclass(frozen=True)
class SpeculativeConfig:
    """How to draft. `model` is the draft's folder or hub id (None: the caller has one), which
    `revision` pins.

    A chain, or a dynamic tree if `eagle_topk` and `num_steps` are given, or a static one if
    `speculative_token_tree` is (see `policies`). `cost_aware_width` lets each round choose how deep
    and wide that is worth being, by given costs (`RoundCosts`, `BatchCosts`) or by "measured" ones
    (see `width`). The keys of `Reading` (`tap_convention`, ...) stand beside the others in the
    JSON.
    """

    method: str = "eagle3"
    model: str | None = None
    revision: str | None = None
    num_speculative_tokens: int = 4
    draft_tensor_parallel_size: int = 1
    eagle_topk: int | None = None
    num_steps: int | None = None
    speculative_token_tree: Sequence[Sequence[int]] | None = None
    confidence_threshold: float = 0.0
    verification: Verification = "match"
    cost_aware_width: RoundCosts | BatchCosts | str | None = None
    reading: Reading = AS_WRITTEN

    def __post_init__(self) -> None:
        if self.method != "eagle3":
            raise ValueError(f"method: supported is 'eagle3', got {self.method!r}")
        if self.model is not None and not isinstance(self.model, str):
            raise ValueError(f"model: must be a folder or a hub id, got {self.model!r}")
        if self.model == "":
            raise ValueError("model: must be a folder or a hub id, got ''")
        if self.revision is not None and not (isinstance(self.revision, str) and self.revision):
            raise ValueError(
                f"revision: must be a commit, tag or branch of the hub, got {self.revision!r}"
            )
        _ = self.policy  # checks its values
        width = self.cost_aware_width
        if width is not None and self.verification == "rejection":
            raise ValueError(
                "cost_aware_width: leaves out nodes by their own probability, which verification "
                "'rejection' does not allow; give one of them"
            )
        is_costs = isinstance(width, RoundCosts | BatchCosts)
        if width is not None and width != MEASURED and not is_costs:
            raise ValueError(f'cost_aware_width: must be "{MEASURED}" or costs, got {width!r}')
        size = self.draft_tensor_parallel_size
        if type(size) is not int or size < 1:
            raise ValueError(
                f"draft_tensor_parallel_size: must be 1 or the target's size, got {size!r}"
            )

    @property
    def policy(self) -> Policy:
        """What is drafted at most. Raises ValueError for values out of range or of two policies."""
        if self.speculative_token_tree is not None:
            if self.eagle_topk is not None or self.num_steps is not None:
                raise ValueError(
                    "speculative_token_tree: is a static tree; eagle_topk and num_steps ask for a "
                    "dynamic one"
                )
            if not all(isinstance(path, list | tuple) for path in self.speculative_token_tree):
                raise ValueError(
                    f"speculative_token_tree: must be a list of lists of ranks, got "
                    f"{self.speculative_token_tree!r}"
                )
            return StaticTree(
                self.speculative_token_tree, self.confidence_threshold, self.verification
            )
        if self.eagle_topk is None and self.num_steps is None:
            return Chain(self.num_speculative_tokens, self.confidence_threshold, self.verification)
        if self.eagle_topk is None or self.num_steps is None:
            raise ValueError("eagle_topk, num_steps: a dynamic tree needs both")
        if self.verification != "match":
            raise ValueError(
                "verification: must be match for a dynamic tree, which keeps nodes by their own "
                f"probability, got {self.verification!r}"
            )
        sizes = self.num_speculative_tokens, self.eagle_topk, self.num_steps
        return DynamicTree(*sizes, self.confidence_threshold)

    def policy_on(
        self,
        target: Llama4ForCausalLM,
        draft: Eagle3Llama4ForCausalLM | RemoteDraft | None,
        max_sequences: int = 1,
    ) -> Policy:
        """The policy, cost-aware if asked; "measured" takes up to two seconds of this pair, for
        rounds of up to `max_sequences`.

        Raises ValueError for "measured" on a target that is cut over ranks.
        """
        if self.cost_aware_width is None or draft is None:
            return self.policy
        if isinstance(self.cost_aware_width, RoundCosts | BatchCosts):
            return CostAware(self.policy, self.cost_aware_width)
        if target.communicator is not None or isinstance(draft, RemoteDraft):
            raise ValueError(
                f"cost_aware_width: {MEASURED!r} would be other numbers on every rank of a target "
                'that is cut; give them, {"verify_ms": {ROWS: MS, ...}}'
            )
        costs = measured_costs(target, draft, self.policy.num_rows, max_sequences)
        return CostAware(self.policy, costs)

    @classmethod
    def from_json(cls, text: str) -> "SpeculativeConfig":
        """Parses a JSON object. Raises ValueError on an unknown key or a value out of range."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"speculative config: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"speculative config: must be a JSON object, got {text!r}")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SpeculativeConfig":
        """From the parsed object. Errors as `from_json`."""
        if "tensor_parallel_size" in values:
            raise ValueError(
                "speculative config key 'tensor_parallel_size': the draft's size is set by "
                "'draft_tensor_parallel_size', the target's outside of the speculative config"
            )
        known = [field.name for field in fields(cls) if field.name != "reading"] + list(KEYS)
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(
                f"speculative config: unknown keys {unknown}; known are {', '.join(known)}"
            )
        own = {key: value for key, value in values.items() if key not in KEYS}
        if isinstance(own.get("cost_aware_width"), dict):
            own["cost_aware_width"] = costs_from_dict(own["cost_aware_width"])
        reading = Reading.from_dict({k: v for k, v in values.items() if k in KEYS})
        return cls(**own, reading=reading)
