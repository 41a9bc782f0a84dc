"""Feed-forwards of the training target; a token visits only the expert it is routed to."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, one_hot, silu

from aerie.llama4.config import Llama4Config


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        gate, up = both.chunk(2, dim=-1)
        return self.down_proj(silu(gate) * up)


class Experts(nn.Module):
    """The routed experts' weights, input dimension first."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        num, width, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, width, 2 * inner))
        self.down_proj = nn.Parameter(torch.empty(num, inner, width))

    def forward(self, x_RD: Tensor, sizes: list[int]) -> Tensor:
        """Rows in expert order, `sizes[e]` of them for expert e."""
        # unbind's backward is one stack; indexing an expert would pad each gradient to all.
        weights = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        parts = []
        for part_RD, (gate_up, down) in zip(x_RD.split(sizes), weights, strict=True):
            gate, up = (part_RD @ gate_up).chunk(2, dim=-1)
            parts.append((up * silu(gate)) @ down)
        return torch.cat(parts)


class MoE(nn.Module):
    """One routed expert, its input scaled by the router's sigmoid, beside the shared expert."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = Experts(config)
        self.shared_expert = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_RD = x_BTD.flatten(0, 1)
        logits_RE = self.router(x_RD)
        best = logits_RE.max(-1, keepdim=True)
        order_R = best.indices[:, 0].argsort(stable=True)
        chosen_RE = one_hot(best.indices[:, 0], logits_RE.shape[-1])
        scaled_RD = (x_RD * best.values.sigmoid()).index_select(0, order_R)
        routed_RD = self.experts(scaled_RD, chosen_RE.sum(0).tolist())
        # Switch Transformer's balance loss (arXiv 2101.03961, eq. 4): 1 when all are used alike.
        share_E, wanted_E = chosen_RE.float().mean(0), logits_RE.softmax(-1).mean(0)
        self.imbalance = logits_RE.shape[-1] * (share_E * wanted_E).sum()
        routed_RD = routed_RD.index_select(0, order_R.argsort())
        return self.shared_expert(x_BTD) + routed_RD.view_as(x_BTD)
