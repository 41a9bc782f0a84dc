"""The draft alone, behind a finished target: trained towards nothing but the target's choices.

Greedy verification asks for no more than them. The target stays as it is, so one pass over its own
text gives all that the draft is shown and asked for, whatever the number of steps.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from aerie.assets.build.draft import Draft
from aerie.assets.build.model import Llama4
from aerie.assets.build.optimizer import Optimizer
from aerie.assets.build.training import REPORT_EVERY, Leg, draft_loss

CHOICES = Leg("choices", 3000, 0, 8, 256, 1e-3, 1e-5, draft_weight=1.0, depth=6)
TEXTS = 6  # as many prompts again as `distill` continues at a time
CONFIDENCE = 0.8  # times the draft's logits at the end: choices teach it to be too sure
COLD = 1e4  # a logit of which the softmax is the choice
ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Shown:
    """What the target does with its own text: its taps, and the token it chooses behind each."""

    ids_BT: Tensor
    taps_BTC: Tensor
    choices_BT: Tensor


@torch.no_grad()
def shown(model: Llama4, taps: tuple[int, ...], ids_BT: Tensor) -> Shown:
    """One pass over all rows."""
    parts = []
    for rows_BT in ids_BT.to(model.device).split(ROWS_AT_ONCE):
        out = model(rows_BT)
        taps_BTC = torch.cat([out.entries[layer] for layer in taps], dim=-1)
        parts.append((rows_BT, taps_BTC, out.logits.argmax(-1)))
    return Shown(*(torch.cat(column) for column in zip(*parts, strict=True)))


def train_draft(leg: Leg, model: Llama4, draft: Draft, ids_BT: Tensor) -> None:
    """Train the draft in place, on `leg.own_rows` of the rows `ids_BT` a step."""
    torch.set_flush_denormal(True)
    everything = shown(model, draft.shape.taps, ids_BT)
    optimizer = Optimizer([draft])
    for step in range(leg.steps):
        rows = torch.randint(len(ids_BT), (leg.own_rows,), device=everything.ids_BT.device)
        ids, choices = everything.ids_BT[rows], everything.choices_BT[rows]
        logits_BTV = COLD * one_hot(choices, model.config.vocab_size).float()
        with torch.no_grad():
            embed_BTD = model.embed(ids)
        drafted = draft_loss(
            draft, everything.taps_BTC[rows], embed_BTD, logits_BTV, ids, leg.depth
        )
        drafted.loss.backward()
        optimizer.step(leg.rate(step))
        if step % REPORT_EVERY == 0 or step + 1 == leg.steps:
            print(f"{leg.name} {step} {drafted}", file=sys.stderr, flush=True)
    with torch.no_grad():
        draft.lm_head.weight.mul_(CONFIDENCE)
