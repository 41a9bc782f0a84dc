"""Acceptance length of a greedy chain, measured the plain way: real rounds, one text at a time.

The target's greedy text is decoded first. A round then drafts a chain after the committed tokens
and keeps the leading candidates that the target would have written, plus the bonus token.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from aerie.assets.build.distill import greedy
from aerie.assets.build.draft_training import view
from aerie.assets.build.tokenizer import EOS_ID

if TYPE_CHECKING:
    from transformers import Llama4ForCausalLM

    from aerie.assets.build.draft import Draft


@dataclass(frozen=True)
class Rounds:
    """How many candidates each round of one text had accepted."""

    accepted: list[int]
    text_ids: list[int]

    @property
    def mean_length(self) -> float:
        """Tokens per target pass, the bonus token included."""
        return 1 + sum(self.accepted) / len(self.accepted)


class ChainDrafter:
    """Drafts chains with the draft's keys and values cached row by row."""

    def __init__(self, draft: "Draft", kept_U: torch.Tensor, embedding: torch.nn.Module) -> None:
        self.draft, self.kept_U, self.embedding = draft, kept_U, embedding

    def prefill(self, taps_TC: torch.Tensor, ids_T: torch.Tensor) -> None:
        """First pass: row i pairs the taps of token i with token i + 1."""
        hidden_1TD = self.draft.fc(taps_TC[None, :-1])
        position_T = torch.arange(len(ids_T) - 1, device=ids_T.device)
        causal_TT = torch.ones(len(position_T), len(position_T), device=ids_T.device).tril() > 0
        shape = self.draft.shape
        self.keys = hidden_1TD.new_empty(1, shape.num_kv_heads, 0, shape.head_dim)
        self.values = self.keys
        pre_1TD = self._layer(hidden_1TD, ids_T[1:], position_T, causal_TT)
        self.first_pre, self.first_keys, self.first_values = pre_1TD, self.keys, self.values

    def chain(self, length: int, depth: int) -> list[int]:
        """Candidates after `length` committed tokens and the bonus token that follows them."""
        self.keys = self.first_keys[..., :length, :]
        self.values = self.first_values[..., :length, :]
        pre_11D = self.first_pre[:, length - 1 : length]
        candidates = [self._best(pre_11D)]
        while len(candidates) < depth:
            position_T = torch.tensor([length + len(candidates) - 1], device=pre_11D.device)
            token_T = torch.tensor(candidates[-1:], device=pre_11D.device)
            pre_11D = self._layer(pre_11D, token_T, position_T, None)
            candidates.append(self._best(pre_11D))
        return candidates

    def _best(self, pre_11D: torch.Tensor) -> int:
        return int(self.kept_U[self.draft.logits(pre_11D).argmax()])

    def _layer(
        self,
        hidden_1TD: torch.Tensor,
        ids_T: torch.Tensor,
        position_T: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        layer = self.draft.midlayer
        x_1TC = layer.joined(self.embedding(ids_T)[None], hidden_1TD)
        q, k, v = layer.self_attn.project(x_1TC, position_T)
        k, v = k[:, :, 0], v[:, :, 0]
        self.keys = torch.cat([self.keys, k], dim=2)
        self.values = torch.cat([self.values, v], dim=2)
        out_1HTK = scaled_dot_product_attention(
            q.flatten(1, 2), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        hidden_1TD = hidden_1TD + layer.self_attn.o_proj(out_1HTK.transpose(1, 2).flatten(2))
        return hidden_1TD + layer.mlp(layer.post_attention_layernorm(hidden_1TD))


@torch.no_grad()
def measure(
    model: "Llama4ForCausalLM",
    draft: "Draft",
    kept_U: torch.Tensor,
    prompt_ids: list[int],
    new_tokens: int = 128,
    depth: int = 4,
) -> Rounds:
    """Rounds over one prompt's continuation, up to eos or `new_tokens`."""
    prompt_1T = torch.tensor([prompt_ids], device=model.device)
    # Rounds near the end draft past it, so a few more tokens are known.
    ids_T = greedy(model, prompt_1T, len(prompt_ids) + new_tokens + depth + 1)[0]
    written = ids_T[len(prompt_ids) :].tolist()
    end = len(prompt_ids) + min(new_tokens, (written + [EOS_ID]).index(EOS_ID) + 1)
    drafter = ChainDrafter(draft, kept_U, model.get_input_embeddings())
    drafter.prefill(view(model, ids_T[None], draft.shape).taps[0], ids_T)
    accepted, length = [], len(prompt_ids)
    while length + 1 < end:
        hits = _leading_hits(drafter.chain(length, depth), ids_T[length + 1 : end].tolist())
        accepted.append(hits)
        length += hits + 1
    return Rounds(accepted, ids_T[:end].tolist())


def _leading_hits(candidates: list[int], written: list[int]) -> int:
    hits = 0
    for candidate, token in zip(candidates, written, strict=False):
        if candidate != token:
            break
        hits += 1
    return hits


def reached(rounds: list[Rounds], depth: int) -> list[float]:
    """Share of rounds in which at least 1, 2, ... candidates were accepted."""
    accepted = [count for one in rounds for count in one.accepted]
    return [sum(c > level for c in accepted) / len(accepted) for level in range(depth)]
