"""SwiGLU feed-forward: Llama 4's dense layers, its shared expert, and the draft's MLP."""

from torch import Tensor

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.gate_up import gate_up, gate_up_ref
from aerie.kernels.linear import Linear
from aerie.llama4.packing import PackedModule, Packing


class MLP(PackedModule):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, inner_width: int, backend: ResolvedBackend) -> None:
        super().__init__(
            Packing("gate_up_proj", {"gate_proj": inner_width, "up_proj": inner_width})
        )
        self.gate_up_proj = Linear(width, 2 * inner_width, False, backend)
        self.down_proj = Linear(inner_width, width, False, backend)
        self._gate_up = pick(backend, gate_up, gate_up_ref)

    def forward(self, x_TD: Tensor) -> Tensor:
        own = self.gate_up_proj._parameters
        return self.down_proj(self._gate_up(x_TD, own["weight"], scale=own["weight_scale"]))
