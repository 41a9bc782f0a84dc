"""The draft's decoder layer: attention over [embedding, hidden state], then a dense SwiGLU."""

from torch import Tensor

from aerie.eagle3.config import Eagle3Config
from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.module import Module
from aerie.kernels.qkv_projection import qkv_projection, qkv_projection_ref
from aerie.kernels.rms_norm import RMSNorm
from aerie.kernels.rotation import Rotation
from aerie.llama4.attention import Attention
from aerie.llama4.communicator import Communicator, shard_of
from aerie.llama4.decoder import LayerOutput
from aerie.llama4.mlp import MLP
from aerie.llama4.sharded_modules import residual_norm
from aerie.llama4.sharding import local_attention
from aerie.llama4.step import Step


class Eagle3DecoderLayer(Module):
    """The draft's layer: attention over [embedding, hidden state], then a dense SwiGLU."""

    def __init__(
        self, config: Eagle3Config, backend: ResolvedBackend, communicator: Communicator | None
    ) -> None:
        super().__init__()
        width, eps, shard = config.hidden_size, config.rms_norm_eps, shard_of(communicator)
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(width, eps, backend)
        self.hidden_norm = RMSNorm(width, eps, backend)
        self.self_attn = Attention(local_attention(config.attention, shard), 0, backend)
        self.post_attention_layernorm = residual_norm(width, eps, backend, communicator)
        self.mlp = MLP(width, shard.width(config.intermediate_size), backend)
        self._qkv_projection = pick(backend, qkv_projection, qkv_projection_ref)

    def forward(
        self, ids_T: Tensor, table_VD: Tensor, hidden_TD: Tensor, turns: Rotation, step: Step
    ) -> LayerOutput:
        """`ids_T` are rows of the embedding `table_VD`; the output's two parts add up to `pre`."""
        projection = self.self_attn.qkv_proj
        qkv_TF = self._qkv_projection(
            ids_T,
            table_VD,
            hidden_TD,
            self.input_layernorm.weight,
            self.hidden_norm.weight,
            self.hidden_norm.eps,
            projection.weight,
            bias_F=projection.bias,
        )
        attended_TD = self.self_attn.attend(qkv_TF, turns, step)
        residual_TD = self.hidden_norm(hidden_TD) if self.norm_before_residual else hidden_TD
        middle = self.post_attention_layernorm.add(attended_TD, residual_TD)
        return LayerOutput(self.mlp(middle.normed_TD), middle.residual_TD)
