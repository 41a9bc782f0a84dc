"""Attention for training whole rows from position 0: chunks are folded into the batch.

Half of a training step was masked attention; without a mask, chunk by chunk, it is a quarter of
that. It knows no cache and no padding, so inference keeps transformers' own sdpa.
"""

from typing import TYPE_CHECKING, Any

from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

if TYPE_CHECKING:
    import torch

NAME = "rows_from_zero"


def register() -> str:
    """Make the implementation known to transformers; returns its name."""
    AttentionInterface.register(NAME, rows_from_zero)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)
    return NAME


def rows_from_zero(
    module: Any,
    q_BHTK: "torch.Tensor",
    k_BGTK: "torch.Tensor",
    v_BGTK: "torch.Tensor",
    attention_mask: None,
    scaling: float,
    **_options: object,
) -> tuple["torch.Tensor", None]:
    """Transformers' attention signature; causal, within a chunk where the layer says so."""
    num_rows, _, length, _ = q_BHTK.shape
    chunked = module.config.layer_types[module.layer_idx] == "chunked_attention"
    chunk = module.config.attention_chunk_size if chunked else length
    out = scaled_dot_product_attention(
        _fold(q_BHTK, chunk),
        _fold(k_BGTK, chunk),
        _fold(v_BGTK, chunk),
        is_causal=True,
        scale=scaling,
        enable_gqa=True,
    )
    out_BTHK = out.transpose(1, 2).reshape(num_rows, length, *out.shape[1::2])
    return out_BTHK, None


def _fold(x_BHTK: "torch.Tensor", chunk: int) -> "torch.Tensor":
    num_rows, num_heads, length, head_dim = x_BHTK.shape
    if length % chunk:
        raise ValueError(f"row length must be a multiple of the chunk {chunk}, got {length}")
    folded = x_BHTK.reshape(num_rows, num_heads, length // chunk, chunk, head_dim)
    return folded.transpose(1, 2).reshape(-1, num_heads, chunk, head_dim)
