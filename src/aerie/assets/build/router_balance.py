"""Load balance of the routers during training: the auxiliary loss and a usage histogram."""

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import one_hot
from transformers.models.llama4.modeling_llama4 import Llama4Router

if TYPE_CHECKING:
    from torch import nn


class RouterBalance:
    """Listens to every router; reads the step's logits after a forward pass."""

    def __init__(self, model: "nn.Module") -> None:
        self.routers = [m for m in model.modules() if isinstance(m, Llama4Router)]
        self.logits: dict[int, torch.Tensor] = {}
        self.hooks = [
            router.register_forward_hook(self._recorder(index))
            for index, router in enumerate(self.routers)
        ]

    def loss(self) -> torch.Tensor:
        """Switch Transformer's balance loss (arXiv 2101.03961, eq. 4), mean over layers."""
        terms = []
        for logits_TE in self.logits.values():
            share_E = self._share(logits_TE)
            probability_E = logits_TE.softmax(-1).mean(0)
            terms.append(logits_TE.shape[-1] * (share_E * probability_E).sum())
        return torch.stack(terms).mean()

    def histogram(self) -> str:
        """Percent of rows per expert, one group per MoE layer, for the last forward pass."""
        shares = [(100 * self._share(logits_TE)).tolist() for logits_TE in self.logits.values()]
        return "  experts % " + " | ".join(
            " ".join(f"{share:.0f}" for share in layer) for layer in shares
        )

    def remove(self) -> None:
        """Stop listening."""
        for hook in self.hooks:
            hook.remove()

    def _recorder(self, index: int):
        def record(_module: object, _inputs: object, outputs: tuple[torch.Tensor, ...]) -> None:
            self.logits[index] = outputs[1]

        return record

    @staticmethod
    def _share(logits_TE: torch.Tensor) -> torch.Tensor:
        return one_hot(logits_TE.argmax(-1), logits_TE.shape[-1]).float().mean(0)
