"""The draft during training: one EAGLE-3 layer, unrolled the way serving unrolls it.

Row i holds fc(taps of token i) and the embedding of token i + 1; it predicts token i + 2. At
step s the same row holds its own output of step s - 1 and the embedding of token i + 1 + s. It
attends the step-0 keys of rows up to i and its own keys of steps 1..s: exactly what a chain that
starts at row i finds in its cache. (EAGLE-3, arXiv 2503.01840, calls this training-time test.)
Module names are the tensor names of the raw EAGLE-3 checkpoint layout. Beside the usual letters,
C is a concatenated width (2D or 3D) and R counts the query heads of one key head.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import silu


@dataclass(frozen=True)
class DraftShape:
    """Sizes of the draft; taps name the residual stream that enters these target layers."""

    vocab_size: int = 1024
    draft_vocab_size: int = 768
    hidden_size: int = 128
    intermediate_size: int = 384
    num_heads: int = 10
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    taps: tuple[int, int, int] = (2, 6, 9)


class RowCache:
    """Keys and values of step 0 for all rows, then of every later step for its own row."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []


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

    def project(
        self, x_BTC: torch.Tensor, position_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [B, G, R, T, K] and k, v [B, G, 1, T, K], with R query heads per key head."""
        num_kv, width = self.shape.num_kv_heads, self.shape.head_dim
        q, k, v = (
            proj(x_BTC).unflatten(-1, (num_kv, -1, width)).permute(0, 2, 3, 1, 4)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (
            rotate(q, position_T, self.shape.rope_theta),
            rotate(k, position_T, self.shape.rope_theta),
            v,
        )

    def forward(
        self, x_BTC: torch.Tensor, position_T: torch.Tensor, cache: RowCache
    ) -> torch.Tensor:
        """Attend, after appending this step's keys and values to the cache."""
        q, k, v = self.project(x_BTC, position_T)
        cache.keys.append(k)
        cache.values.append(v)
        return self.o_proj(_attend(q, cache).permute(0, 3, 1, 2, 4).flatten(2))


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """The layer between fc and the final norm; takes the embedding beside the hidden state."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.self_attn = DraftAttention(shape)
        self.mlp = DraftMLP(shape)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def joined(self, embed: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The attention's input: embedding first, then the hidden state, each with its norm."""
        return torch.cat([self.input_layernorm(embed), self.hidden_norm(hidden)], dim=-1)

    def forward(
        self,
        embed_BTD: torch.Tensor,
        hidden_BTD: torch.Tensor,
        position_T: torch.Tensor,
        cache: RowCache,
    ) -> torch.Tensor:
        """The un-normed output; the residual is the hidden state before its norm."""
        x_BTC = self.joined(embed_BTD, hidden_BTD)
        hidden_BTD = hidden_BTD + self.self_attn(x_BTC, position_T, cache)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Draft(nn.Module):
    """fc, the layer, the final norm and the head over the draft vocabulary."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(3 * shape.hidden_size, shape.hidden_size, bias=False)
        self.midlayer = DraftLayer(shape)
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.draft_vocab_size, bias=False)

    def logits(self, pre_BTD: torch.Tensor) -> torch.Tensor:
        """Logits over the draft vocabulary from the un-normed output."""
        return self.lm_head(self.norm(pre_BTD))

    def unroll(
        self, taps_BTC: torch.Tensor, embed_BTD: torch.Tensor, num_steps: int
    ) -> list[torch.Tensor]:
        """Logits [B, T, U] of every step; rows whose token would lie past the end wrap around."""
        cache, outputs = RowCache(), []
        hidden_BTD = self.fc(taps_BTC)
        position_T = torch.arange(taps_BTC.shape[1], device=taps_BTC.device)
        for step in range(num_steps):
            shifted_BTD = embed_BTD.roll(-1 - step, dims=1)
            hidden_BTD = self.midlayer(shifted_BTD, hidden_BTD, position_T + step, cache)
            outputs.append(self.logits(hidden_BTD))
        return outputs


def rotate(x: torch.Tensor, position_T: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate-half RoPE over the last dimension of [..., T, K]."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device) / half)
    angle = position_T[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _attend(q: torch.Tensor, cache: RowCache) -> torch.Tensor:
    num_rows = q.shape[-2]
    q = q * q.shape[-1] ** -0.5
    causal = torch.full((num_rows, num_rows), float("-inf"), device=q.device).triu(1)
    first = q @ cache.keys[0].transpose(-1, -2) + causal
    own = [(q * key).sum(-1, keepdim=True) for key in cache.keys[1:]]
    weights = torch.cat([first, *own], dim=-1).softmax(-1)
    out = weights[..., :num_rows] @ cache.values[0]
    for step, value in enumerate(cache.values[1:]):
        out = out + weights[..., num_rows + step, None] * value
    return out
