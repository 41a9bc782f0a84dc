"""Llama 4 attention: project, rotate, normalise or scale, store, attend (contract: HF's order).

Keys are cached rotated and normalised. The NoPE temperature goes by absolute position, so that tree
nodes of one depth agree; on a chain this equals transformers, which counts cache slots.
"""

from torch import Tensor

from aerie.kernels.attention_prologue import (
    Temperature,
    attention_prologue,
    attention_prologue_ref,
)
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.linear import Linear
from aerie.kernels.rotation import Rotation
from aerie.kernels.tree_attention import (
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    TreeRows,
    tree_attention,
    tree_attention_ref,
)
from aerie.llama4.attention_config import AttentionSpec
from aerie.llama4.kv_scales import KVScales
from aerie.llama4.packing import PackedModule, Packing
from aerie.llama4.step import Step


class Attention(PackedModule):
    """One attention layer as its `AttentionSpec` says; `layer` is its index in the cache.

    `kv_scales` is what `allocate_cache` gives an FP8 cache for this layer: a loader may replace it.
    """

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
        self.kv_scales = KVScales.ones()
        self.qkv_proj = Linear(spec.input_size, sum(parts.values()), spec.bias, backend)
        self.o_proj = Linear(query_size, spec.hidden_size, spec.bias, backend)
        self._prologue = pick(backend, attention_prologue, attention_prologue_ref)
        self._tree_attention = pick(backend, tree_attention, tree_attention_ref)

    def forward(self, x_TD: Tensor, rotation: Rotation, step: Step) -> Tensor:
        return self.attend(self.qkv_proj(x_TD, step.quantises_rows), rotation, step)

    def attend(self, qkv_TF: Tensor, rotation: Rotation, step: Step) -> Tensor:
        """What follows the projection of the inputs to packed queries, keys and values."""
        spec, kv = self.spec, step.cache.layers[self.layer]
        placement = step.placements[kv.pool]
        q_THK = self._prologue(
            qkv_TF,
            kv.k_RCGK,
            kv.v_RCGK,
            placement.slots_T,
            rotation=rotation if spec.rotary_layout is not None else None,
            layout=spec.rotary_layout or "interleaved",
            qk_norm_eps=spec.qk_norm_eps,
            temperature=self._at(placement.rows),
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
        )
        attended_THK = self._tree_attention(
            q_THK,
            kv.k_RCGK,
            kv.v_RCGK,
            placement.rows,
            spec.chunk_size,
            spec.head_dim**-0.5 * spec.score_factor,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
        )
        attended_TD = attended_THK.reshape(qkv_TF.shape[0], spec.num_heads * spec.head_dim)
        return self.o_proj(attended_TD, step.quantises_rows)

    def _at(self, rows: TreeRows) -> Temperature | None:
        """The step's temperature, one for all layers that have the same."""
        own = self.spec.temperature
        if own is None:
            return None
        if own not in rows.memo:
            rows.memo[own] = Temperature(rows.positions_T, own.floor_scale, own.scale)
        return rows.memo[own]
