"""Other people's kernels for our ops, where they are installed. None is a dependency.

A loader imports its peer and raises ImportError where it is missing, which the row then says. A
peer's `prepare` brings our arguments into its layout, untimed: it may keep its own best layout.
"""

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from aerie.kernels.tree_attention import TreeRows
from bench.expert_peers import grouped_mm, scaled_mm_loop, transformers_experts
from bench.peer import Peer


def sdpa() -> Peer:
    """torch's attention over dense keys with a boolean mask; gathering and mask are not timed."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
        heads = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)
        return heads[0].transpose(0, 1)

    return Peer(attend, dense_attention)


def dense_attention(
    q_THK: Tensor, k_cache: Tensor, v_cache: Tensor, rows: TreeRows, chunk: int | None, scale: float
) -> tuple:
    """Paged keys and values of one sequence as [1, G, S, K], queries [1, H, T, K], the mask."""
    prefix, page_size = int(rows.prefix_lengths_B[0]), k_cache.shape[1]
    position_T = rows.positions_T
    first = int(position_T.min()) // chunk * chunk if chunk else 0
    s = torch.arange(min(first, prefix), prefix + len(q_THK), device=q_THK.device)
    slots = rows.page_table_BM[0, s // page_size].long() * page_size + s % page_size
    k, v = (cache.flatten(0, 1)[slots].transpose(0, 1)[None] for cache in (k_cache, v_cache))
    new = torch.arange(len(q_THK), device=q_THK.device)
    causal = new <= new[:, None]
    seen = causal if rows.ancestors_T is None else (rows.ancestors_T[:, None] >> new) & 1 == 1
    visible = F.pad(seen, (len(s) - len(new), 0), value=True)
    if chunk:
        key_position = torch.cat([s[: len(s) - len(new)], position_T])
        visible = visible & (key_position // chunk == position_T[:, None] // chunk)
    return q_THK.transpose(0, 1)[None], k.contiguous(), v.contiguous(), visible, scale


def liger_swiglu() -> Peer:
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    return Peer(function.apply, lambda gate, up: (gate.contiguous(), up.contiguous()))


def flashinfer_swiglu() -> Peer:
    module = import_module("flashinfer")
    return Peer(module.silu_and_mul, lambda gate, up: (torch.cat((gate, up), dim=-1),))


def flashinfer_add_rms_norm() -> Peer:
    module = import_module("flashinfer")

    def run(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        module.fused_add_rmsnorm(x, residual, weight, eps)  # both in place
        return x, residual

    return Peer(run, lambda *args: args)


PEERS: dict[str, dict[str, Callable[[], Peer]]] = {
    "add_rms_norm": {"flashinfer": flashinfer_add_rms_norm},
    "experts": {
        "grouped_mm": grouped_mm,
        "scaled_mm loop": scaled_mm_loop,
        "transformers": transformers_experts,
    },
    "swiglu": {"liger": liger_swiglu, "flashinfer": flashinfer_swiglu},
    "tree_attention": {"sdpa": sdpa},
    "tree_attention_prompt": {"sdpa": sdpa},
}
