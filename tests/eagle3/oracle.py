"""An Eagle3 draft in plain PyTorch, written from contract.md 3, 4 and 6.1: a second opinion.

It shares no code with `aerie` and reads a raw checkpoint's tensors and config directly. It has no
cache: it keeps the list of rows (hidden state, token, position) and recomputes all of them every
time. Reached through the fixture `oracle`, as tests cannot import each other.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, eps: float, weight: Tensor | float = 1.0) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def inverse_frequencies(config: dict[str, Any], head_dim: int) -> Tensor:
    """The draft's own theta, 10000 if it writes none; llama3 scaling with low == high allowed, and
    YaRN by the number of turns within the original context (arXiv 2309.00071, equation 13)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta", scaling.get("rope_theta", 10000.0))
    frequencies = []
    for i in range(head_dim // 2):
        f = theta ** (-2 * i / head_dim)
        if scaling.get("rope_type", "default") == "llama3":
            turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            smooth = float(turns > high) if low == high else (turns - low) / (high - low)
            smooth = min(max(smooth, 0.0), 1.0)
            f = (1 - smooth) * f / scaling["factor"] + smooth * f
        if scaling.get("rope_type") == "yarn":
            context = scaling["original_max_position_embeddings"]
            pairs = [
                head_dim / 2 * math.log(context / (2 * math.pi * turns), theta) for turns in (32, 1)
            ]
            first, last = max(math.floor(pairs[0]), 0), min(math.ceil(pairs[1]), head_dim - 1)
            share = min(max((i - first) / (last - first), 0.0), 1.0)
            f = (1 - share) * f + share * f / scaling["factor"]
        frequencies.append(f)
    return torch.tensor(frequencies, dtype=torch.float64)


def rope_gain(config: dict[str, Any]) -> float:
    """Of queries and of keys: YaRN's "temperature"."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if scaling.get("rope_type") != "yarn":
        return 1.0
    return scaling.get("attention_factor", 0.1 * math.log(scaling["factor"]) + 1)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, *, interleaved: bool) -> Tensor:
    """x [rows, heads, head_dim]; pair i is (2i, 2i + 1) if interleaved, else (i, i + half)."""
    angle = positions.double()[:, None, None] * frequencies
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, a * sin + b * cos)
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def tapped_outputs(config: dict[str, Any], num_layers: int) -> list[int]:
    """Layers of the target whose outputs fc reads; a file's own ids say just that."""
    key = "eagle_aux_hidden_state_layer_ids"
    explicit = config.get(key) or config.get("eagle_config", {}).get(key)
    return sorted(explicit or (1, num_layers // 2 - 1, num_layers - 4))


class DraftOracle:
    """Full forward passes of a raw-layout draft, straight from its tensors and its config."""

    def __init__(
        self, tensors: dict[str, Tensor], config: dict[str, Any], target: dict[str, Tensor]
    ) -> None:
        self.tensors, self.config = tensors, config
        self.embedding: Tensor = target["model.embed_tokens.weight"]
        self.head: Tensor = tensors["lm_head.weight"]
        self.offsets = tensors.get("d2t", torch.zeros(len(self.head), dtype=torch.int64))
        self.is_llama4 = config["model_type"] == "llama4_text"
        entries = config.get("no_rope_layers") or [1]
        self.has_rope = not self.is_llama4 or entries[-1] == 1

    def norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.config["rms_norm_eps"], self.tensors[f"{name}.weight"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(
            x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        )

    def features(self, taps) -> Tensor:
        """fc over the taps, concatenated in ascending layer order."""
        if self.config.get("fc_norm"):
            taps = [self.norm(f"fc_norm.{i}", tap) for i, tap in enumerate(taps)]
        x = torch.cat(tuple(taps), -1)
        return self.linear("fc", self.norm("input_norm", x) if self.has_joint_norm() else x)

    def has_joint_norm(self) -> bool:
        nested = self.config.get("eagle_config", {})
        return self.config.get("norm_before_fc", nested.get("norm_before_fc", False))

    def forward(self, hidden: Tensor, tokens: Tensor, positions: Tensor):
        """(state for the next level, draft logits) of all rows; row i attends to rows up to i."""
        e = self.norm("midlayer.input_layernorm", self.embedding[tokens])
        g = self.norm("midlayer.hidden_norm", hidden)
        residual = g if self.config.get("norm_before_residual", False) else hidden
        residual = residual + self.attention(torch.cat((e, g), -1), positions)
        x = self.norm("midlayer.post_attention_layernorm", residual)
        gate = functional.silu(self.linear("midlayer.mlp.gate_proj", x))
        x = self.linear("midlayer.mlp.down_proj", gate * self.linear("midlayer.mlp.up_proj", x))
        pre = residual + x
        post = self.norm("norm", pre)
        logits = functional.linear(post, self.head) * self.config.get("logit_scale", 1.0)
        return (post if self.config.get("norm_output") else pre), logits

    def attention(self, x: Tensor, positions: Tensor) -> Tensor:
        config, rows = self.config, len(x)
        head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        q, k, v = (
            self.linear(f"midlayer.self_attn.{name}_proj", x).view(rows, -1, head_dim)
            for name in "qkv"
        )
        if self.has_rope:
            frequencies = inverse_frequencies(config, head_dim)
            q = rotate(q, positions, frequencies, interleaved=self.is_llama4)
            k = rotate(k, positions, frequencies, interleaved=self.is_llama4)
            q, k = (y * rope_gain(config) for y in (q, k))
            if self.is_llama4 and config["use_qk_norm"]:
                q, k = (rms_norm(y, config["rms_norm_eps"]) for y in (q, k))
        elif config["attn_temperature_tuning"]:
            floors = torch.floor((positions + 1) / config["floor_scale"])
            q = q * (1 + config["attn_scale"] * torch.log1p(floors))[:, None, None]
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
        future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
        probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", probabilities, v).flatten(1)
        return self.linear("midlayer.self_attn.o_proj", mixed)


class ChainOracle:
    """The committed rows of one sequence; guessed rows live only inside `propose`."""

    def __init__(self, draft: DraftOracle) -> None:
        self.draft = draft
        self.hidden = torch.empty(0, draft.config["hidden_size"])
        self.tokens = torch.empty(0, dtype=torch.int64)

    def observe(self, taps, next_ids: Tensor) -> None:
        self.hidden = torch.cat((self.hidden, self.draft.features(taps)))
        self.tokens = torch.cat((self.tokens, next_ids))

    def levels(self, count: int) -> list[tuple[Tensor, Tensor, int]]:
        """(next state, draft logits, proposed id) of each level; level 1 is the first pass."""
        length = len(self.tokens)
        hidden, tokens, positions = self.hidden, self.tokens, torch.arange(length)
        found = []
        for level in range(1, count + 1):
            pre, logits = self.draft.forward(hidden, tokens, positions)
            draft_id = int(logits[-1].argmax())
            target_id = draft_id + int(self.draft.offsets[draft_id])
            found.append((pre[-1], logits[-1], target_id))
            hidden = torch.cat((hidden, pre[-1:]))
            tokens = torch.cat((tokens, torch.tensor([target_id])))
            positions = torch.cat((positions, torch.tensor([length + level - 1])))
        return found
