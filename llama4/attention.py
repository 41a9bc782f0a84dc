"""Llama 4 attention: project, rotate, normalise or scale, store, attend (contract: HF's order).

Keys are cached rotated and normalised. The NoPE temperature goes by absolute position, so that tree
nodes of one depth agree; on a chain this equals transformers, which counts cache slots.
"""

from torch import Tensor, nn

from aerie.kernels.attention_temperature import attention_temperature, attention_temperature_ref
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.linear import Linear
from aerie.kernels.rope import rope, rope_ref
from aerie.kernels.rotation import Rotation
from aerie.kernels.tree_attention import (
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    tree_attention,
    tree_attention_ref,
)
from aerie.llama4.attention_config import AttentionSpec
from aerie.llama4.cache import Step


class Attention(nn.Module):
    """One attention layer as its `AttentionSpec` says; `layer` is its index in the cache."""

    def __init__(self, spec: AttentionSpec, layer: int, backend: ResolvedBackend) -> None:
        super().__init__()
        if backend == "triton" and not MIN_HEAD_DIM <= spec.head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim: the Triton kernels take {MIN_HEAD_DIM}..{MAX_HEAD_DIM}, got "
                f"{spec.head_dim}; use backend='eager'"
            )
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.spec = spec
        self.layer = layer
        self.q_proj = Linear(spec.input_size, query_size, spec.bias, backend)
        self.k_proj = Linear(spec.input_size, kv_size, spec.bias, backend)
        self.v_proj = Linear(spec.input_size, kv_size, spec.bias, backend)
        self.o_proj = Linear(query_size, spec.hidden_size, spec.bias, backend)
        self._rope = pick(backend, rope, rope_ref)
        self._temperature = pick(backend, attention_temperature, attention_temperature_ref)
        self._tree_attention = pick(backend, tree_attention, tree_attention_ref)

    def forward(self, x_TD: Tensor, rotation: Rotation, step: Step) -> Tensor:
        spec = self.spec
        q_THK = self.q_proj(x_TD).unflatten(-1, (spec.num_heads, spec.head_dim))
        k_TGK = self.k_proj(x_TD).unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        v_TGK = self.v_proj(x_TD).unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        if spec.rotary_layout is not None:
            heads = self._rope(q_THK, k_TGK, rotation, spec.rotary_layout, spec.qk_norm_eps)
            q_THK, k_TGK = heads.q_THK, heads.k_TGK
        if spec.temperature is not None:
            floor_scale, scale = spec.temperature.floor_scale, spec.temperature.scale
            q_THK = self._temperature(q_THK, step.rows.positions_T, floor_scale, scale)
        step.cache.append(self.layer, k_TGK, v_TGK, step.slots_T)
        attended_THK = self._tree_attention(
            q_THK,
            step.cache.k_LRCGK[self.layer],
            step.cache.v_LRCGK[self.layer],
            step.rows,
            spec.chunk_size,
            spec.head_dim**-0.5,
        )
        return self.o_proj(attended_THK.flatten(-2))
