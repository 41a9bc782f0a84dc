"""Llama 4 attention: project, rotate, normalise or scale, store, attend (contract: HF's order).

Keys are cached rotated and normalised. The NoPE temperature goes by absolute position, so that tree
nodes of one depth agree; on a chain this equals transformers, which counts cache slots.
"""

from torch import Tensor

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
from aerie.llama4.packing import PackedModule, Packing


class Attention(PackedModule):
    """One attention layer as its `AttentionSpec` says; `layer` is its index in the cache."""

    def __init__(self, spec: AttentionSpec, layer: int, backend: ResolvedBackend) -> None:
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        super().__init__(Packing("qkv_proj", parts))
        if backend == "triton" and not MIN_HEAD_DIM <= spec.head_dim <= MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim: the Triton kernels take {MIN_HEAD_DIM}..{MAX_HEAD_DIM}, got "
                f"{spec.head_dim}; use backend='eager'"
            )
        self.spec = spec
        self.layer = layer
        self.heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        self.qkv_proj = Linear(spec.input_size, sum(parts.values()), spec.bias, backend)
        self.o_proj = Linear(query_size, spec.hidden_size, spec.bias, backend)
        self._rope = pick(backend, rope, rope_ref)
        self._temperature = pick(backend, attention_temperature, attention_temperature_ref)
        self._tree_attention = pick(backend, tree_attention, tree_attention_ref)

    def forward(self, x_TD: Tensor, rotation: Rotation, step: Step) -> Tensor:
        return self.attend(self.qkv_proj(x_TD), rotation, step)

    def attend(self, qkv_TF: Tensor, rotation: Rotation, step: Step) -> Tensor:
        """What follows the projection of the inputs to packed queries, keys and values."""
        spec = self.spec
        heads_THK = qkv_TF.view(-1, sum(self.heads), spec.head_dim)
        q_THK, k_TGK, v_TGK = heads_THK.split(self.heads, dim=1)
        if spec.rotary_layout is not None:
            heads = self._rope(q_THK, k_TGK, rotation, spec.rotary_layout, spec.qk_norm_eps)
            q_THK, k_TGK = heads.q_THK, heads.k_TGK
        if spec.temperature is not None:
            floor_scale, scale = spec.temperature.floor_scale, spec.temperature.scale
            q_THK = self._temperature(q_THK, step.rows.positions_T, floor_scale, scale)
        step.cache.append(self.layer, k_TGK, v_TGK, step.slots_T)
        attended_THK = self._tree_attention(
            q_THK,
            step.cache.k_RCGK[self.layer],
            step.cache.v_RCGK[self.layer],
            step.rows,
            spec.chunk_size,
            spec.head_dim**-0.5,
        )
        return self.o_proj(attended_THK.flatten(-2))
