"""The tiny Llama 4 for training: transformers' model at less cost, and its greedy continuation.

Parameters are named as in Hugging Face's files, so its state dict is a checkpoint's.
Letters as in CONTRIBUTING.md, except that T counts the positions of one of B rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aerie.assets.build.attention import Attention, Positions
from aerie.assets.build.feed_forward import MLP, MoE
from aerie.llama4.config import Llama4Config


@dataclass(frozen=True)
class Output:
    """Logits [B, T, V], the stream [B, T, D] that enters each layer, the routers' imbalance."""

    logits: Tensor
    entries: list[Tensor]
    imbalance: Tensor


class DecoderLayer(nn.Module):
    """Attention, then a dense or routed feed-forward, each behind its norm."""

    def __init__(self, config: Llama4Config, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        is_moe = layer in config.moe_layers
        self.feed_forward = MoE(config) if is_moe else MLP(width, config.intermediate_size_mlp)
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)

    def forward(self, hidden_BTD: Tensor, positions: Positions) -> Tensor:
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), positions)
        return hidden_BTD + self.feed_forward(self.post_attention_layernorm(hidden_BTD))


class Decoder(nn.Module):
    """Embedding, layers and final norm: the part that checkpoints call `model`."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama4(nn.Module):
    """The whole model, randomly initialised."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def embed(self, ids_BT: Tensor) -> Tensor:
        """[B, T, D]."""
        return self.model.embed_tokens(ids_BT)

    def forward(self, ids_BT: Tensor, positions: Positions | None = None) -> Output:
        """Logits of all positions."""
        positions = positions or Positions(self.config, self.device)
        positions.advance(ids_BT.shape[1])
        hidden_BTD, entries, imbalance = self.embed(ids_BT), [], []
        for layer in self.model.layers:
            entries.append(hidden_BTD)
            hidden_BTD = layer(hidden_BTD, positions)
            if isinstance(layer.feed_forward, MoE):
                imbalance.append(layer.feed_forward.imbalance)
        logits_BTV = self.lm_head(self.model.norm(hidden_BTD))
        return Output(logits_BTV, entries, torch.stack(imbalance).mean())

    @torch.no_grad()
    def greedy(self, ids_BT: Tensor, length: int) -> Tensor:
        """Rows continued to `length` tokens, each the most likely one."""
        positions = Positions(self.config, self.device)
        last_BT = ids_BT
        while ids_BT.shape[1] < length:
            last_BT = self(last_BT, positions).logits[:, -1:].argmax(-1)
            ids_BT = torch.cat([ids_BT, last_BT], dim=1)
        return ids_BT
