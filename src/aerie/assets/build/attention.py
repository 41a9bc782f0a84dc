"""Attention of the training target: rows of one length, from position 0 or one token further.

Chunks are folded into the batch instead of masked, and q, k and v are one product.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from aerie.kernels.rotation import inverse_frequencies
from aerie.llama4.config import Llama4Config


class Positions:
    """The positions of one pass over T tokens, and what the passes before it left behind."""

    def __init__(self, config: Llama4Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.start = self.end = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def advance(self, num_tokens: int) -> None:
        """Move on to the next tokens of every row."""
        self.start, self.end = self.end, self.end + num_tokens
        position_T1 = torch.arange(self.start, self.end, device=self.device)[:, None]
        rope, temperature = self.config.rope, self.config.temperature
        frequency_J = inverse_frequencies(self.config.head_dim, rope.theta, rope.scaling)
        angle_TJ = position_T1 * frequency_J.to(self.device)
        self.turns_TJ = torch.polar(torch.ones_like(angle_TJ), angle_TJ)
        assert temperature is not None
        chunks_T1 = torch.floor((position_T1 + 1) / temperature.floor_scale)
        self.temperature_T1 = 1 + temperature.scale * torch.log1p(chunks_T1)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, S, K] of a layer with this pass's at their end."""
        if self.start:
            k = torch.cat([self.keys[layer], k], dim=2)
            v = torch.cat([self.values[layer], v], dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Rotary, normed and within its chunk, or NoPE, global and with a temperature."""

    def __init__(self, config: Llama4Config, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.eps = layer, config.head_dim, config.rms_norm_eps
        self.rotates = bool(config.no_rope_layers[layer])
        self.chunk = config.attention_chunk_size if config.chunked_layers[layer] else None
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, positions: Positions) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        x = linear(x_BTD, torch.cat([part.weight for part in projections]))
        heads = [part.out_features // self.head_dim for part in projections]
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.rotates:
            qk, v = x.split([heads[0] + heads[1], heads[2]], dim=1)
            qk = rms_norm(_rotate(qk, positions.turns_TJ), (self.head_dim,), eps=self.eps)
            q, k = qk.split(heads[:2], dim=1)
        else:
            q, k, v = x.split(heads, dim=1)
            q = q * positions.temperature_T1
        k, v = positions.extend(self.layer, k, v)
        out = self._attend(q, k, v, positions)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
        num_rows, length = q.shape[0], q.shape[2]
        chunk = self.chunk or positions.end
        if length == 1:
            first = positions.start // chunk * chunk
            return _attend_one(q, k[:, :, first:], v[:, :, first:])
        assert positions.start == 0
        if length > chunk:
            q, k, v = (_fold(part, chunk) for part in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return _unfold(out, num_rows) if length > chunk else out


def _rotate(x_BHTK: Tensor, turns_TJ: Tensor) -> Tensor:
    """RoPE in Llama 4's interleaved layout: neighbours are a complex number."""
    pairs = torch.view_as_complex(x_BHTK.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns_TJ).flatten(-2)


def _attend_one(q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
    """One query a row: the query heads of one key head are the rows of a small product."""
    q = q_BH1K.unflatten(1, (k_BGSK.shape[1], -1)).squeeze(3) * q_BH1K.shape[-1] ** -0.5
    return ((q @ k_BGSK.transpose(2, 3)).softmax(-1) @ v_BGSK).flatten(1, 2).unsqueeze(2)


def _fold(x_BHTK: Tensor, chunk: int) -> Tensor:
    """Chunks become rows. Raises RuntimeError where T is no multiple of the chunk."""
    return x_BHTK.unflatten(2, (-1, chunk)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, num_rows: int) -> Tensor:
    return x.unflatten(0, (num_rows, -1)).transpose(1, 2).flatten(2, 3)
