"""Llama 4's mixture of experts: a shared expert plus the routed ones, of which only those are run.

The sigmoid of the selected router logit scales the routed expert's *input*; the shared expert sees
the unscaled input (transformers' `Llama4TextMoe`).
"""

from collections.abc import Callable

from torch import Tensor

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.experts import experts, experts_ref
from aerie.kernels.linear import Linear
from aerie.kernels.module import Module
from aerie.kernels.moe_prologue import MoEEntry, moe_prologue, moe_prologue_ref
from aerie.kernels.rms_norm import RMSNorm
from aerie.kernels.router import Routing
from aerie.llama4.config import Llama4Config
from aerie.llama4.experts import Experts
from aerie.llama4.mlp import MLP
from aerie.llama4.sharding import WHOLE, Shard


class MoE(Module):
    """shared_expert(x) + sum over the chosen experts of expert(x * sigmoid(router logit)).

    One rank of several computes a summand of that: its part of the widths, or its experts.
    """

    on_routing: Callable[[Routing], None] | None = None  # told of every routing (`expert_counts`)

    def __init__(
        self, config: Llama4Config, backend: ResolvedBackend, shard: Shard = WHOLE
    ) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, False, backend)
        self.experts = Experts(config, backend, shard)
        inner_width = shard.width(config.intermediate_size)
        self.shared_expert = MLP(config.hidden_size, inner_width, backend)
        self._prologue = pick(backend, moe_prologue, moe_prologue_ref)
        self._experts = pick(backend, experts, experts_ref)

    def enter(self, x_TD: Tensor, residual_TD: Tensor, norm: RMSNorm) -> MoEEntry:
        """Behind attention: the sum with the stream, its norm, and where every row goes."""
        gain, router = norm._parameters["weight"], self.router._parameters["weight"]
        assert gain is not None
        assert router is not None
        codes = self.experts.gate_up.row_codes
        entry = self._prologue(
            norm.whole(x_TD), residual_TD, gain, norm.eps, router, self.experts_per_token, codes
        )
        if self.on_routing is not None:
            self.on_routing(entry.routing)
        return entry

    def forward(self, entry: MoEEntry, quantises: bool = False) -> Tensor:
        """`quantises`: the shared expert's rows meet FP8 weights as codes (`Linear`), and then one
        quantisation serves it and the routed experts, where their scales are of a kind. At fewer
        rows it reads the same bytes without codes, and is more exact.
        """
        weights, x_TD, shared = self.experts, entry.normed_TD, self.shared_expert
        gate_up = weights.gate_up
        serves_both = quantises and gate_up.row_codes == shared.gate_up_proj.row_codes
        shared_TD = shared(x_TD, quantises, entry.quantized if serves_both else None)
        return self._experts(
            x_TD,
            entry.routing,
            gate_up,
            weights.down,
            shared_TD,
            weights.first_expert,
            entry.quantized,
        )
