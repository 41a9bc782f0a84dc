"""The draft's attention while chains are unrolled: level 0 for all rows, later levels for some.

Letters: P unrolled rows, R query heads of one key head, C the concatenated input width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from aerie.assets.build.draft_shape import DraftShape


class RowCache:
    """Keys and values of level 0 for all rows, then of every later level for its own row."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []


class DraftAttention(nn.Module):
    """Grouped attention over a row cache; rotate-half RoPE, no other positional device."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        width, wide_in = shape.head_dim, 2 * shape.hidden_size
        self.q_proj = nn.Linear(wide_in, shape.num_heads * width, bias=False)
        self.k_proj = nn.Linear(wide_in, shape.num_kv_heads * width, bias=False)
        self.v_proj = nn.Linear(wide_in, shape.num_kv_heads * width, bias=False)
        self.o_proj = nn.Linear(shape.num_heads * width, shape.hidden_size, bias=False)

    def forward(self, x_BPC: Tensor, row_P: Tensor, level: int, cache: RowCache) -> Tensor:
        """Rows `row_P` attend, after adding this level's keys and values to the cache."""
        shape, projections = self.shape, (self.q_proj, self.k_proj, self.v_proj)
        x = linear(x_BPC, torch.cat([part.weight for part in projections]))
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = x.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2).split(heads, dim=1)
        q, k = (rotate(part, row_P + level, shape.rope_theta) for part in (q, k))
        cache.keys.append(k)
        cache.values.append(v)
        out = _attend_rows(q, cache, row_P) if level else _attend_causally(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, position_P: Tensor, theta: float) -> Tensor:
    """Rotate-half RoPE over the last dimension of [..., P, K]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device) / half)
    angle = position_P[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _attend_rows(q_BHPK: Tensor, cache: RowCache, row_P: Tensor) -> Tensor:
    """Each row sees level 0 up to itself and its own keys of the later levels."""
    first_k, first_v = cache.keys[0], cache.values[0]
    num_kv, num_keys = first_k.shape[1], first_k.shape[2]
    q = q_BHPK.unflatten(1, (num_kv, -1)) * q_BHPK.shape[-1] ** -0.5  # [B, G, R, P, K]
    later = torch.arange(num_keys, device=row_P.device) > row_P[:, None]
    scores = (q.flatten(2, 3) @ first_k.transpose(-1, -2)).unflatten(2, q.shape[2:4])
    scores = scores.masked_fill(later, float("-inf"))
    own = [(q * key[:, :, None]).sum(-1, keepdim=True) for key in cache.keys[1:]]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1)
    out = (weights[..., :num_keys].flatten(2, 3) @ first_v).unflatten(2, q.shape[2:4])
    for level, value in enumerate(cache.values[1:]):
        out = out + weights[..., num_keys + level, None] * value[:, :, None]
    return out.flatten(1, 2)
