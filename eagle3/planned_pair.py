"""What is planned for: a target, its draft and how they are going to run, without any values."""

from dataclasses import dataclass

import torch

from aerie.eagle3.binding import Shared
from aerie.eagle3.checkpoint import OwnParts
from aerie.eagle3.choice_form import EVERY_FILTER, ChoiceForm
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.policies import Policy
from aerie.kernels.backend import ResolvedBackend
from aerie.llama4.checkpoint import assign, planned_tensors
from aerie.llama4.communicator import LoneRank
from aerie.llama4.config import Llama4Config
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.quantization import Quantization
from aerie.llama4.sharding import WHOLE, Shard


@dataclass(frozen=True)
class DraftPlan:
    """A draft, and which of its matrices it has itself."""

    config: Eagle3Config
    parts: OwnParts


@dataclass(frozen=True)
class Run:
    """How a pair is going to run; without a draft there is no `policy`.

    `lag` rounds run ahead of the host (`rows.lag_on`), and choose as `choice` says. Of a target
    that is cut, this is the rank with the draft; `draft_size` is 1 or the target's.
    """

    dtype: torch.dtype
    kv_dtype: torch.dtype
    quantization: Quantization | None = None
    policy: Policy | None = None
    backend: ResolvedBackend = "triton"
    shard: Shard = WHOLE
    draft_size: int = 1
    lag: int = 0
    choice: ChoiceForm = EVERY_FILTER
    has_graphs: bool = False

    @property
    def is_captured(self) -> bool:
        """Whether graphs are wanted, and rounds are alike."""
        return self.has_graphs and (self.policy is None or self.policy.form is not None)

    @property
    def num_drafted(self) -> int:
        """Rows behind a root at most."""
        return 0 if self.policy is None else self.policy.num_rows

    @property
    def communicator(self) -> LoneRank | None:
        return None if self.shard.size == 1 else LoneRank(self.shard)

    @property
    def draft_communicator(self) -> LoneRank | None:
        return None if self.draft_size == 1 else self.communicator


def empty_target(config: Llama4Config, run: Run) -> Llama4ForCausalLM:
    """The target without values; `cuda` only says where it is meant to run."""
    device = "cuda" if run.backend == "triton" else "cpu"
    return Llama4ForCausalLM.without_values(
        config, run.backend, device, run.quantization, run.communicator
    )


def empty_draft(plan: DraftPlan, run: Run) -> Eagle3Llama4ForCausalLM:
    """The draft without values, but for its vocabulary map."""
    device = "cuda" if run.backend == "triton" else "cpu"
    with torch.device("meta"):
        return Eagle3Llama4ForCausalLM(
            plan.config, run.backend, device, plan.parts, run.draft_communicator
        )


def empty_pair(
    config: Llama4Config, plan: DraftPlan | None, run: Run
) -> tuple[Llama4ForCausalLM, Eagle3Llama4ForCausalLM | None]:
    """Target and draft bound to each other, in the types that the loader would give them."""
    target, draft = empty_target(config, run), None
    assign(target, planned_tensors(target, run.dtype), "meta")
    if plan is not None:
        draft = empty_draft(plan, run)
        assign(draft, planned_tensors(draft, run.dtype), "meta")
        draft.to("meta")
        embedding = None if plan.parts.embedding else target.model.embed_tokens
        draft.bind(target, Shared(embedding, target.lm_head))
    return target, draft
