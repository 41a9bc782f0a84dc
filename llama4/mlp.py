"""SwiGLU feed-forward: Llama 4's dense layers, its shared expert, and the draft's MLP."""

from torch import Tensor

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.gate_up import gate_up, gate_up_ref
from aerie.kernels.linear import Linear
from aerie.kernels.quantize import Quantized, quantize, quantize_ref
from aerie.kernels.swiglu import swiglu, swiglu_ref
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
        self._quantize = pick(backend, quantize, quantize_ref)
        self._swiglu = pick(backend, swiglu, swiglu_ref)

    def forward(
        self, x_TD: Tensor, quantises: bool = False, quantized: Quantized | None = None
    ) -> Tensor:
        """`quantises`: rows meet FP8 weights as codes (`Linear`), those of `x_TD` as `quantized`
        where a caller has them in the kind that `gate_up_proj.row_codes` names."""
        projection = self.gate_up_proj
        if quantises and projection.row_codes != "none":
            rows = quantized or self._quantize(x_TD, projection.row_codes == "group")
            both_TF2 = projection.of_codes(rows, x_TD.dtype)
            inner_TF = self._swiglu(*both_TF2.chunk(2, dim=-1))
        else:
            own = projection._parameters
            inner_TF = self._gate_up(x_TD, own["weight"], scale=own["weight_scale"])
        return self.down_proj(inner_TF, quantises)
