"""The decoder stack of the Llama 4 text model: embedding, layers, final norm.

The residual stream is kept as (delta, residual) so that every residual add fuses with the norm
behind it. `residual` after a layer's first norm is that layer's un-normed input: EAGLE-3's tap.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.module import Module
from aerie.kernels.rms_norm import NormedResidual
from aerie.kernels.rotation import Rotation, rotation, rotation_ref
from aerie.llama4.attention import Attention
from aerie.llama4.communicator import Communicator, shard_of
from aerie.llama4.config import Llama4Config
from aerie.llama4.mlp import MLP
from aerie.llama4.moe import MoE
from aerie.llama4.sharded_modules import residual_norm, token_embedding
from aerie.llama4.sharding import local_attention
from aerie.llama4.step import Step


@dataclass(frozen=True)
class LayerOutput:
    """`delta_TD` has not been added to the un-normed stream `residual_TD` (None: empty) yet."""

    delta_TD: Tensor
    residual_TD: Tensor | None


@dataclass(frozen=True)
class StackOutput:
    """`hidden_TD` is normalised and feeds the head; the taps [T, D] are in ascending order."""

    hidden_TD: Tensor
    aux_hidden_states: tuple[Tensor, ...]


class DecoderLayer(Module):
    """Attention, then a dense or mixture-of-experts feed-forward, each behind an RMSNorm."""

    def __init__(
        self,
        config: Llama4Config,
        layer: int,
        backend: ResolvedBackend,
        communicator: Communicator | None,
    ) -> None:
        super().__init__()
        shard = shard_of(communicator)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = residual_norm(width, eps, backend, communicator)
        attention = local_attention(config.attention(layer), shard)
        self.self_attn = Attention(attention, layer, backend)
        self.post_attention_layernorm = residual_norm(width, eps, backend, communicator)
        if layer in config.moe_layers:
            self.feed_forward = MoE(config, backend, shard)
        else:
            self.feed_forward = MLP(width, shard.width(config.intermediate_size_mlp), backend)

    def forward(self, entry: NormedResidual, rotation: Rotation, step: Step) -> LayerOutput:
        attended_TD = self.self_attn(entry.normed_TD, rotation, step)
        norm, block = self.post_attention_layernorm, self.feed_forward
        if isinstance(block, MoE):
            middle = block.enter(attended_TD, entry.residual_TD, norm)
            return LayerOutput(block(middle, step.quantises_rows), middle.residual_TD)
        middle = norm.add(attended_TD, entry.residual_TD)
        return LayerOutput(block(middle.normed_TD, step.quantises_rows), middle.residual_TD)


class Llama4Model(Module):
    """Embedding, decoder layers, final norm."""

    inv_freq: Tensor

    def __init__(
        self, config: Llama4Config, backend: ResolvedBackend, communicator: Communicator | None
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = token_embedding(config.vocab_size, width, backend, communicator)
        layers = range(config.num_hidden_layers)
        blocks = (DecoderLayer(config, layer, backend, communicator) for layer in layers)
        self.layers = cast("list[DecoderLayer]", nn.ModuleList(blocks))
        self.norm = residual_norm(width, eps, backend, communicator)
        with torch.device("cpu"):  # computed, not loaded: must exist even while building on meta
            inv_freq_J = config.rope.frequencies(config.head_dim)
        self.register_buffer("inv_freq", inv_freq_J, persistent=False)
        self._rotation = pick(backend, rotation, rotation_ref)

    def rotation(self, positions_T: Tensor) -> Rotation:
        """Cosines and sines of the rows' positions, shared by all layers of a step."""
        return self._rotation(positions_T, self.inv_freq)

    def forward(self, embeds_TD: Tensor, step: Step, aux_layers: Collection[int]) -> StackOutput:
        """All layers over the rows of `step`, tapped at the inputs of `aux_layers`."""
        turns = self.rotation(step.rows.positions_T)
        aux: list[Tensor] = []
        stream = LayerOutput(embeds_TD, None)
        for index, layer in enumerate(self.layers):
            entry = layer.input_layernorm.add(stream.delta_TD, stream.residual_TD)
            if index in aux_layers:
                aux.append(entry.residual_TD)
            stream = layer(entry, turns, step)
        last = self.norm.add(stream.delta_TD, stream.residual_TD)
        if len(self.layers) in aux_layers:
            aux.append(last.residual_TD)
        return StackOutput(last.normed_TD, tuple(aux))
