"""Target and draft trained together for a while, after each was trained alone.

A target this small is unsure of much of its own text, and a one-layer draft trained on it alone
guessed its greedy choices little better than half of the time. Here the draft's loss also reaches
the target: through the taps, as in multi-token prediction (arXiv 2404.19737), and through the
target's own distribution. Half of the rows are the target's own continuations, which makes it surer
of what it would write anyway.
"""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from aerie.assets.build import chunked_attention
from aerie.assets.build.draft_training import unrolled_losses
from aerie.assets.build.router_balance import RouterBalance
from aerie.assets.build.schedule import cosine
from aerie.assets.build.tokenizer import BOS_ID

if TYPE_CHECKING:
    from transformers import Llama4ForCausalLM

    from aerie.assets.build.draft import Draft
    from aerie.assets.build.target import RowSampler


@dataclass(frozen=True)
class JointTraining:
    """Hyper-parameters of the shipped run."""

    steps: int = 300
    topic_rows: int = 5
    own_rows: int = 5
    row_length: int = 256
    target_lr: float = 8e-4
    draft_lr: float = 1.5e-3
    final: float = 0.02  # of each rate
    warmup: int = 20
    unroll: int = 5
    decay: float = 0.85
    own_weight: float = 0.5  # of the loss on the target's own text
    draft_weight: float = 0.4  # of the draft's loss; with 1.0 throughout, the text soon repeats
    balance: float = 0.01
    clip: float = 1.0


LEGS = (
    JointTraining(),
    JointTraining(steps=110, draft_weight=0.7, target_lr=5e-4, draft_lr=1e-3),
)


def train_jointly(
    model: "Llama4ForCausalLM",
    draft: "Draft",
    kept_U: torch.Tensor,
    own_BT: torch.Tensor,
    sampler: "RowSampler",
    plan: JointTraining,
) -> None:
    """Trains both in place. Seeded by the caller."""
    model.train().set_attn_implementation(chunked_attention.register())
    draft.train().requires_grad_(True)
    torch.set_flush_denormal(True)
    balance = RouterBalance(model)
    optimizer = _optimizer(model, draft, plan)
    started = time.monotonic()
    for step in range(plan.steps):
        share = cosine(step, plan.steps, plan.warmup, 1.0, plan.final)
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        picked = torch.randint(len(own_BT), (plan.own_rows,))
        ids_BT = torch.cat([sampler.rows(plan.topic_rows, plan.row_length), own_BT[picked]])
        report = _step(model, draft, kept_U, balance, optimizer, ids_BT.to(model.device), plan)
        if step % 25 == 0 or step + 1 == plan.steps:
            seconds = time.monotonic() - started
            print(f"joint step {step} {report} {seconds:.0f}s", file=sys.stderr, flush=True)
    balance.remove()
    model.eval().set_attn_implementation("sdpa")


def _optimizer(
    model: "Llama4ForCausalLM", draft: "Draft", plan: JointTraining
) -> torch.optim.Optimizer:
    groups = [
        {"params": list(model.parameters()), "peak": plan.target_lr, "weight_decay": 0.02},
        {"params": list(draft.parameters()), "peak": plan.draft_lr, "weight_decay": 0.01},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def _step(
    model: "Llama4ForCausalLM",
    draft: "Draft",
    kept_U: torch.Tensor,
    balance: RouterBalance,
    optimizer: torch.optim.Optimizer,
    ids_BT: torch.Tensor,
    plan: JointTraining,
) -> str:
    outputs = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True)
    taps_BTC = torch.cat([outputs.hidden_states[i] for i in draft.shape.taps], dim=-1)
    logits = draft.unroll(taps_BTC, model.get_input_embeddings()(ids_BT), plan.unroll)
    losses, hits = unrolled_losses(logits, outputs.logits, ids_BT, kept_U)
    weights = [plan.decay**level for level in range(plan.unroll)]
    weighted = [w * loss for w, loss in zip(weights, losses, strict=True)]
    drafted = torch.stack(weighted).sum() / sum(weights)
    topic = _language_loss(outputs.logits[: plan.topic_rows], ids_BT[: plan.topic_rows])
    own = _language_loss(outputs.logits[plan.topic_rows :], ids_BT[plan.topic_rows :])
    loss = topic + plan.own_weight * own + plan.draft_weight * drafted
    (loss + plan.balance * balance.loss()).backward()
    torch.nn.utils.clip_grad_norm_([*model.parameters(), *draft.parameters()], plan.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    shares = " ".join(f"{hit.item():.2f}" for hit in hits)
    return f"topic {topic.item():.2f} own {own.item():.2f} draft {drafted.item():.2f} hit {shares}"


def _language_loss(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    """Next-token loss; bos only ever starts a row or blanks what follows an end token."""
    next_BT = ids_BT[:, 1:].masked_fill(ids_BT[:, 1:] == BOS_ID, -100)
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), next_BT.flatten())
