"""Muon for the matrices of the layers, AdamW for embeddings, heads, routers and gains.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves a matrix by the nearest matrix
with equal singular values to its momentum.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# The quintic that pushes singular values towards 1, and how often it is applied.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
MOMENTUM = 0.95
WEIGHT_DECAY = 0.05
CLIP = 1.0  # of the norm of all gradients together
NOT_MUON = ("embed_tokens", "lm_head", "router")


class Optimizer:
    """Steps all parameters of some modules; matrices of one shape are orthogonalised together."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        named = [pair for module in modules for pair in module.named_parameters()]
        self.parameters = [parameter for _, parameter in named]
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        rest = []
        for name, parameter in named:
            if parameter.ndim == 1 or any(part in name for part in NOT_MUON):
                rest.append(parameter)
            else:
                by_shape[parameter.shape].append(parameter)
        self.stacks = list(by_shape.values())
        self.momenta = [torch.zeros_like(torch.stack(list(stack))) for stack in self.stacks]
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, rate: float) -> None:
        """Move all parameters by their gradients, and forget the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        for stack, momentum in zip(self.stacks, self.momenta, strict=True):
            _muon_step(stack, momentum, rate)
        for parameter in self.parameters:
            parameter.grad = None


@torch.no_grad()
def _muon_step(stack: list[nn.Parameter], momentum: Tensor, rate: float) -> None:
    gradient = torch.stack([parameter.grad for parameter in stack if parameter.grad is not None])
    momentum.lerp_(gradient, 1 - MOMENTUM)
    changes = orthogonalised(gradient.lerp(momentum, MOMENTUM))
    # An entry's root mean square becomes 0.2, as in AdamW's updates, so one rate serves both.
    changes *= 0.2 * max(changes.shape[-2:]) ** 0.5
    for parameter, change in zip(stack, changes, strict=True):
        parameter.mul_(1 - rate * WEIGHT_DECAY).sub_(rate * change)


def orthogonalised(matrices: Tensor) -> Tensor:
    """[..., M, N] with all singular values near 1, by Newton-Schulz iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-2, -1) if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(-2, -1) if tall else x
