"""Llama 4's mixture of experts: a shared expert plus the routed ones, of which only those are run.

The sigmoid of the selected router logit scales the routed expert's *input*; the shared expert sees
the unscaled input (transformers' `Llama4TextMoe`).
"""

import torch
from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.experts import experts, experts_ref
from aerie.kernels.linear import Linear
from aerie.kernels.router import router, router_ref
from aerie.llama4.config import Llama4Config
from aerie.llama4.mlp import MLP


class Experts(nn.Module):
    """The routed experts' weights, fused and input-major as Hugging Face stores them."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * F), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(E, F, D), requires_grad=False)


class MoE(nn.Module):
    """shared_expert(x) + sum over the chosen experts of expert(x * sigmoid(router logit))."""

    def __init__(self, config: Llama4Config, backend: ResolvedBackend) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.router = Linear(config.hidden_size, config.num_local_experts, False, backend)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size, backend)
        self._router = pick(backend, router, router_ref)
        self._experts = pick(backend, experts, experts_ref)

    def forward(self, x_TD: Tensor) -> Tensor:
        routing = self._router(self.router(x_TD), self.experts_per_token)
        weights = self.experts
        return self._experts(
            x_TD, routing, weights.gate_up_proj, weights.down_proj, self.shared_expert(x_TD)
        )
