"""Other people's routed experts, on the arguments of `experts`: one choice per row.

Rows are sorted by expert untimed, so torch's products get what their callers must compute first.
Each takes the weights that it can, and says which it cannot.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aerie.kernels.expert_matrix import ExpertMatrix
from aerie.kernels.quantize import quantize_ref
from aerie.kernels.router import Routing
from bench.peer import Peer


def grouped_mm() -> Peer:
    """torch's grouped product over rows sorted by expert."""
    multiply = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if multiply is None:
        raise ImportError("this torch has no grouped_mm")

    def run(
        x: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor, order: Tensor, ends: Tensor
    ) -> Tensor:
        gate, up = multiply(x, gate_up.mT, offs=ends).chunk(2, dim=-1)
        return shared.index_add(0, order, multiply(F.silu(gate) * up, down.mT, offs=ends))

    return Peer(run, sorted_by_expert)


def sorted_by_expert(
    x_TD: Tensor, routing: Routing, gate_up: ExpertMatrix, down: ExpertMatrix, shared: Tensor
) -> tuple:
    """Scaled rows in the order of their experts, that order, and where every expert's rows end."""
    if gate_up.is_fp8:
        raise ValueError("grouped_mm takes unquantised weights")
    ids_T = routing.ids_TA[:, 0]
    order = ids_T.argsort(stable=True)
    ends = torch.bincount(ids_T, minlength=len(gate_up.weight)).cumsum(0).int()
    rows = (x_TD * routing.scores_TA)[order]
    return rows, gate_up.weight, down.weight, shared, order, ends


def scaled_mm_loop() -> Peer:
    """One of torch's scaled products per distinct expert and matrix, scales per row and channel."""

    def run(
        x: Tensor,
        scores: Tensor,
        gate_up: ExpertMatrix,
        down: ExpertMatrix,
        shared: Tensor,
        rows_of: dict[int, Tensor],
    ) -> Tensor:
        y = shared.clone()
        for expert, rows in rows_of.items():
            gate, up = scaled_mm(x[rows] * scores[rows], gate_up, expert).chunk(2, dim=-1)
            y.index_copy_(0, rows, shared[rows] + scaled_mm(F.silu(gate) * up, down, expert))
        return y

    return Peer(run, rows_by_expert)


def scaled_mm(rows: Tensor, matrix: ExpertMatrix, expert: int) -> Tensor:
    quantized, scale = quantize_ref(rows), matrix.scale
    assert scale is not None
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        quantized.codes_TD,
        matrix.weight[expert].t(),
        quantized.scales_TN,
        scale[expert].t(),
        out_dtype=rows.dtype,
    )


def rows_by_expert(
    x_TD: Tensor, routing: Routing, gate_up: ExpertMatrix, down: ExpertMatrix, shared: Tensor
) -> tuple:
    """The rows of every distinct expert, read on the host before anything is timed."""
    scale = gate_up.scale
    if scale is None or scale.shape[1:] != (gate_up.weight.shape[1], 1):
        raise ValueError("the loop takes FP8 weights with a scale per channel")
    ids_T = routing.ids_TA[:, 0]
    rows_of = {e: (ids_T == e).nonzero()[:, 0] for e in sorted(set(ids_T.tolist()))}
    return x_TD, routing.scores_TA, gate_up, down, shared, rows_of


def transformers_experts() -> Peer:
    """transformers' Llama 4: every expert computes every row, most of them scaled by zero."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    def prepare(
        x_TD: Tensor, routing: Routing, gate_up: ExpertMatrix, down: ExpertMatrix, shared: Tensor
    ) -> tuple:
        if gate_up.is_fp8:
            raise ValueError("transformers' experts take unquantised weights")
        count, depth, width = down.weight.shape
        config = Llama4TextConfig(
            hidden_size=depth, intermediate_size=width, num_local_experts=count
        )
        with torch.device("meta"):
            module = Llama4TextExperts(config)
        for name, matrix in (("gate_up_proj", gate_up), ("down_proj", down)):
            weight = matrix.weight.mT.contiguous()
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
        scores_ET = x_TD.new_zeros(len(x_TD), count)
        scores_ET = scores_ET.scatter_(1, routing.ids_TA.long(), routing.scores_TA).t()
        return module, x_TD, scores_ET.reshape(-1, 1), shared

    def run(module: torch.nn.Module, x: Tensor, scores: Tensor, shared: Tensor) -> Tensor:
        count = len(scores) // len(x)
        return shared + module(x.repeat(count, 1) * scores).view(count, *x.shape).sum(0)

    return Peer(run, prepare)
