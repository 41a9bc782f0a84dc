"""Training of the draft on the target's own continuations, with a little plain topic text."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import log_softmax

from aerie.assets.build import chunked_attention
from aerie.assets.build.draft import Draft, DraftShape
from aerie.assets.build.schedule import cosine
from aerie.assets.build.tokenizer import BOS_ID, EOS_ID

if TYPE_CHECKING:
    from transformers import Llama4ForCausalLM

    from aerie.assets.build.target import RowSampler


@dataclass(frozen=True)
class DraftTraining:
    """Hyper-parameters of the shipped run."""

    steps: int = 900
    rows: int = 10
    topic_rows: int = 2
    unroll: int = 5
    decay: float = 0.8
    peak_lr: float = 2e-3
    final_lr: float = 1e-5
    warmup: int = 40
    weight_decay: float = 0.01
    clip: float = 0.5


@dataclass(frozen=True)
class TargetView:
    """What the draft learns from: taps [B, T, 3D], embeddings [B, T, D], logits [B, T, V]."""

    taps: torch.Tensor
    embed: torch.Tensor
    logits: torch.Tensor


def choose_vocabulary(ids_BT: torch.Tensor, size: int, vocab_size: int) -> torch.Tensor:
    """The most frequent ids, eos always among them, ascending: [U]."""
    counts_V = torch.bincount(ids_BT.flatten(), minlength=vocab_size)
    counts_V[BOS_ID] = 0
    counts_V[EOS_ID] = ids_BT.numel()
    return counts_V.argsort(descending=True, stable=True)[:size].sort().values


@torch.no_grad()
def view(model: "Llama4ForCausalLM", ids_BT: torch.Tensor, shape: DraftShape) -> TargetView:
    """One target pass; hidden state i of transformers is the residual that enters layer i."""
    outputs = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True)
    taps_BTC = torch.cat([outputs.hidden_states[i] for i in shape.taps], dim=-1)
    return TargetView(taps_BTC, model.get_input_embeddings()(ids_BT), outputs.logits)


def train_draft(
    model: "Llama4ForCausalLM",
    distilled_BT: torch.Tensor,
    topic_sampler: "RowSampler",
    seed: int,
    plan: DraftTraining,
) -> tuple[Draft, torch.Tensor]:
    """A trained draft with weights exactly representable in bfloat16, and its kept ids [U]."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    model.set_attn_implementation(chunked_attention.register())
    shape = DraftShape()
    kept_U = choose_vocabulary(distilled_BT, shape.draft_vocab_size, shape.vocab_size)
    kept_U = kept_U.to(model.device)
    draft = initial_draft(model, kept_U, shape)
    optimizer = torch.optim.AdamW(
        draft.parameters(), plan.peak_lr, (0.9, 0.95), weight_decay=plan.weight_decay, fused=True
    )
    started = time.monotonic()
    for step in range(plan.steps):
        picked = torch.randint(len(distilled_BT), (plan.rows - plan.topic_rows,))
        topic_BT = topic_sampler.rows(plan.topic_rows, distilled_BT.shape[1])
        ids_BT = torch.cat([distilled_BT[picked], topic_BT]).to(model.device)
        rate = cosine(step, plan.steps, plan.warmup, plan.peak_lr, plan.final_lr)
        report = _train_step(model, draft, optimizer, ids_BT, kept_U, rate, plan)
        if step % 25 == 0 or step + 1 == plan.steps:
            seconds = time.monotonic() - started
            print(f"draft step {step} {report} {seconds:.0f}s", file=sys.stderr, flush=True)
    model.set_attn_implementation("sdpa")
    return _rounded(draft.eval()), kept_U


@torch.no_grad()
def initial_draft(model: "Llama4ForCausalLM", kept_U: torch.Tensor, shape: DraftShape) -> Draft:
    """Start as the target's head on its highest tap."""
    draft = Draft(shape).to(model.device)
    draft.fc.weight.mul_(0.1)
    draft.fc.weight[:, -shape.hidden_size :] += torch.eye(shape.hidden_size, device=model.device)
    draft.midlayer.self_attn.o_proj.weight.mul_(0.3)
    draft.midlayer.mlp.down_proj.weight.mul_(0.3)
    draft.lm_head.weight.copy_(model.lm_head.weight[kept_U])
    draft.norm.weight.copy_(model.model.norm.weight)
    return draft


def _train_step(
    model: "Llama4ForCausalLM",
    draft: Draft,
    optimizer: torch.optim.Optimizer,
    ids_BT: torch.Tensor,
    kept_U: torch.Tensor,
    rate: float,
    plan: DraftTraining,
) -> str:
    for group in optimizer.param_groups:
        group["lr"] = rate
    seen = view(model, ids_BT, draft.shape)
    logits = draft.unroll(seen.taps, seen.embed, plan.unroll)
    losses, hits = unrolled_losses(logits, seen.logits, ids_BT, kept_U)
    weighted = [plan.decay**step * loss for step, loss in enumerate(losses)]
    torch.stack(weighted).sum().backward()
    torch.nn.utils.clip_grad_norm_(draft.parameters(), plan.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return "loss {} hit {}".format(
        " ".join(f"{loss.item():.2f}" for loss in losses),
        " ".join(f"{hit.item():.2f}" for hit in hits),
    )


def unrolled_losses(
    logits: list[torch.Tensor],
    target_BTV: torch.Tensor,
    ids_BT: torch.Tensor,
    kept_U: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Per step: cross-entropy against the target over the draft vocabulary, and argmax hits."""
    probability_BTU = target_BTV[..., kept_U].softmax(-1)
    best_BT = target_BTV.argmax(-1)
    speaks_BT = (ids_BT != BOS_ID) & (ids_BT != EOS_ID)
    usable_BT = torch.isin(best_BT, kept_U) & speaks_BT
    losses, hits = [], []
    for step, logits_BTU in enumerate(logits):
        # Row j of step s has read token j + 1 + s, so it is compared with the target there.
        ahead = 1 + step
        entropy_BT = -(probability_BTU[:, ahead:] * log_softmax(logits_BTU[:, :-ahead], -1)).sum(-1)
        losses.append((entropy_BT * usable_BT[:, ahead:]).sum() / usable_BT[:, ahead:].sum())
        hit_BT = kept_U[logits_BTU[:, :-ahead].argmax(-1)] == best_BT[:, ahead:]
        hits.append((hit_BT & speaks_BT[:, ahead:]).sum() / speaks_BT[:, ahead:].sum())
    return losses, hits


@torch.no_grad()
def _rounded(draft: Draft) -> Draft:
    for parameter in draft.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return draft
