"""SwiGLU feed-forward: Llama 4's dense layers, its shared expert, and the draft's MLP."""

from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.linear import Linear
from aerie.kernels.swiglu import swiglu, swiglu_ref


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, width: int, inner_width: int, backend: ResolvedBackend) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner_width, False, backend)
        self.up_proj = Linear(width, inner_width, False, backend)
        self.down_proj = Linear(inner_width, width, False, backend)
        self._swiglu = pick(backend, swiglu, swiglu_ref)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self._swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))
