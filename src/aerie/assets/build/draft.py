"""The draft during training: one EAGLE-3 layer, unrolled the way serving unrolls it.

Row i holds fc(taps of token i) and the embedding of token i + 1; it predicts token i + 2. At
level s the same row holds its own output of level s - 1 and the embedding of token i + 1 + s. It
attends the level-0 keys of rows up to i and its own keys of levels 1..s: exactly what a chain that
starts at row i finds in its cache. (EAGLE-3, arXiv 2503.01840, calls this training-time test.)
Rows do not see each other's later levels, so any subset of rows can be unrolled.
Module names are the tensor names of the raw EAGLE-3 checkpoint layout. Beside the usual letters,
C is a concatenated width (2D or 3D), R the query heads of one key head, P the unrolled rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from aerie.assets.build.draft_attention import DraftAttention, RowCache
from aerie.assets.build.draft_shape import DraftShape
from aerie.assets.build.tokenizer import EOS_ID


class DraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: DraftShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
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

    def forward(
        self, embed_BPD: Tensor, hidden_BPD: Tensor, row_P: Tensor, level: int, cache: RowCache
    ) -> Tensor:
        """The un-normed output; the residual is the hidden state before its norm."""
        x_BPC = torch.cat([self.input_layernorm(embed_BPD), self.hidden_norm(hidden_BPD)], dim=-1)
        hidden_BPD = hidden_BPD + self.self_attn(x_BPC, row_P, level, cache)
        return hidden_BPD + self.mlp(self.post_attention_layernorm(hidden_BPD))


class Draft(nn.Module):
    """fc, the layer, the final norm and the head over the kept ids of the target's vocabulary."""

    kept_U: Tensor

    def __init__(self, kept_U: Tensor | None = None, shape: DraftShape | None = None) -> None:
        """`kept_U` is missing only where a state that holds it will be loaded; `shape` None is the
        embedded draft's."""
        super().__init__()
        shape = shape or DraftShape()
        if kept_U is None:
            kept_U = torch.zeros(shape.draft_vocab_size, dtype=torch.int64)
        self.shape = shape
        self.register_buffer("kept_U", kept_U)
        self.fc = nn.Linear(3 * shape.hidden_size, shape.hidden_size, bias=False)
        self.midlayer = DraftLayer(shape)
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.draft_vocab_size, bias=False)

    def unroll(
        self, taps_BTC: Tensor, embed_BTD: Tensor, row_P: Tensor, depth: int
    ) -> list[Tensor]:
        """Logits [B, P, U] of `depth` levels of the chains that start at rows `row_P`.

        All T rows pass through level 0, because chains read their keys. Raises IndexError where
        a chain would read past the last row.
        """
        cache, outputs = RowCache(), []
        all_T = torch.arange(taps_BTC.shape[1], device=taps_BTC.device)
        # The last row has no next token; no chain may start there, so any embedding will do.
        next_BTD = embed_BTD.roll(-1, dims=1)
        hidden = self.midlayer(next_BTD, self.fc(taps_BTC), all_T, 0, cache)[:, row_P]
        outputs.append(self.lm_head(self.norm(hidden)))
        for level in range(1, depth):
            hidden = self.midlayer(embed_BTD[:, row_P + 1 + level], hidden, row_P, level, cache)
            outputs.append(self.lm_head(self.norm(hidden)))
        return outputs


def frequent_ids(texts: Sequence[Sequence[int]]) -> Tensor:
    """The most frequent ids, eos always among them, ascending: [U]."""
    shape = DraftShape()
    ids_T = torch.tensor([i for ids in texts for i in ids])
    counts_V = torch.bincount(ids_T, minlength=shape.vocab_size)
    counts_V[EOS_ID] = len(ids_T)
    return counts_V.argsort(descending=True, stable=True)[: shape.draft_vocab_size].sort().values


@torch.no_grad()
def start_as_head(draft: Draft, head_VD: Tensor, gain_D: Tensor) -> None:
    """Begin as the target's head, behind its last norm, on its highest tap."""
    width = draft.shape.hidden_size
    draft.fc.weight.mul_(0.1)
    draft.fc.weight[:, -width:] += torch.eye(width, device=head_VD.device)
    draft.midlayer.self_attn.o_proj.weight.mul_(0.3)
    draft.midlayer.mlp.down_proj.weight.mul_(0.3)
    draft.lm_head.weight.copy_(head_VD[draft.kept_U])
    draft.norm.weight.copy_(gain_D)
