"""Training of the pair: the legs that lead from noise to the shipped weights, and their one step.

The target starts alone. Then the draft's loss reaches it too, through the taps and through its own
distribution, as in multi-token prediction (arXiv 2404.19737): the first draft of this size, trained
behind a finished target, guessed little better than half of its greedy choices. In the last leg
of both, half of the rows are the target's own text, which makes it surer of what it would write.
Behind the finished target the draft goes on alone (`choices`).
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from aerie.assets.build.draft import Draft
from aerie.assets.build.model import Llama4
from aerie.assets.build.optimizer import Optimizer
from aerie.assets.build.tokenizer import BOS_ID, EOS_ID

DEPTH = 4  # levels the draft is unrolled by, and that acceptance is quoted for
IMBALANCE_WEIGHT = 0.01  # top-1 routing starves experts early on
OWN_WEIGHT = 0.5  # of the loss on the target's own text
WARMUP = 20
REPORT_EVERY = 25


@dataclass(frozen=True)
class Leg:
    """Some steps with a learning rate that falls in a straight line after a short warm-up."""

    name: str
    steps: int
    topic_rows: int
    own_rows: int
    row_length: int
    first_rate: float
    last_rate: float
    draft_weight: float  # of the draft's loss; 0 where the target is trained alone
    depth: int = DEPTH

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        share = step / max(1, self.steps - 1)
        rate = self.first_rate + (self.last_rate - self.first_rate) * share
        return rate * min(1.0, (step + 1) / WARMUP)


ALONE = Leg("alone", 350, 6, 0, 384, first_rate=3e-3, last_rate=3e-3, draft_weight=0.0)
TOGETHER = Leg("together", 500, 8, 0, 256, first_rate=3e-3, last_rate=5e-4, draft_weight=0.2)
OWN_TEXT = Leg("own text", 400, 5, 5, 256, first_rate=1.2e-3, last_rate=2e-5, draft_weight=0.3)


@dataclass(frozen=True)
class Losses:
    """What a step minimises, and the share of chains that got past each level."""

    topic: Tensor
    own: Tensor
    draft: Tensor
    imbalance: Tensor
    reached: Tensor

    def total(self, leg: Leg) -> Tensor:
        language = self.topic + OWN_WEIGHT * self.own
        return language + leg.draft_weight * self.draft + IMBALANCE_WEIGHT * self.imbalance

    def __str__(self) -> str:
        shares = " ".join(f"{share:.2f}" for share in self.reached.tolist())
        parts = {"topic": self.topic, "own": self.own, "draft": self.draft}
        return " ".join(f"{k} {v.item():.2f}" for k, v in parts.items()) + f" reached {shares}"


def train(leg: Leg, model: Llama4, draft: Draft | None, rows: Callable[[], Tensor]) -> None:
    """Train in place; `rows` gives the token ids [B, T] of a step, topic rows first."""
    # Moments of rarely used weights decay into denormals, which are slow on a CPU.
    torch.set_flush_denormal(True)
    optimizer = Optimizer([model] if draft is None else [model, draft])
    started = time.monotonic()
    for step in range(leg.steps):
        losses = step_losses(model, draft, rows().to(model.device), leg)
        losses.total(leg).backward()
        optimizer.step(leg.rate(step))
        if step % REPORT_EVERY == 0 or step + 1 == leg.steps:
            seconds = time.monotonic() - started
            print(f"{leg.name} {step} {losses} {seconds:.0f}s", file=sys.stderr, flush=True)


def step_losses(model: Llama4, draft: Draft | None, ids_BT: Tensor, leg: Leg) -> Losses:
    """One pass of both models over the rows."""
    topic_rows = leg.topic_rows
    out = model(ids_BT)
    zero = out.imbalance.new_zeros(())
    topic = _language_loss(out.logits[:topic_rows], ids_BT[:topic_rows])
    own = zero
    if topic_rows < len(ids_BT):
        own = _language_loss(out.logits[topic_rows:], ids_BT[topic_rows:])
    drafted = Drafted(zero, zero.expand(leg.depth))
    if draft is not None:
        taps_BTC = torch.cat([out.entries[layer] for layer in draft.shape.taps], dim=-1)
        drafted = draft_loss(draft, taps_BTC, model.embed(ids_BT), out.logits, ids_BT, leg.depth)
    return Losses(topic, own, drafted.loss, out.imbalance, drafted.reached)


@dataclass(frozen=True)
class Drafted:
    """The draft's loss, and the share of chains that got past each level."""

    loss: Tensor
    reached: Tensor

    def __str__(self) -> str:
        shares = " ".join(f"{share:.2f}" for share in self.reached.tolist())
        return f"draft {self.loss.item():.2f} reached {shares}"


def draft_loss(
    draft: Draft,
    taps_BTC: Tensor,
    embed_BTD: Tensor,
    logits_BTV: Tensor,
    ids_BT: Tensor,
    depth: int,
) -> Drafted:
    """Cross-entropy against the target at every level that serving would have reached.

    A chain that missed is over, so only chains whose every candidate so far was the target's count
    on; the mean over all chains then weighs each level by how often it is reached. Half of the rows
    are unrolled: neighbours teach nearly the same.
    """
    kept_U = draft.kept_U
    probability_BTU = logits_BTV[..., kept_U].softmax(-1)
    best_BT = logits_BTV.argmax(-1)
    # bos only ever starts a row or blanks what follows an end token.
    speaks_BT = (ids_BT != BOS_ID) & (ids_BT != EOS_ID)
    usable_BT = torch.isin(best_BT, kept_U) & speaks_BT
    num_starts = ids_BT.shape[1] - depth
    row_P = torch.randperm(num_starts, device=ids_BT.device)[: num_starts // 2].sort().values
    levels = draft.unroll(taps_BTC, embed_BTD, row_P, depth)
    alive_BP = speaks_BT[:, row_P + 1]
    num_chains = alive_BP.sum()
    losses, reached = [], []
    for level, logits_BPU in enumerate(levels):
        # At this level a row has read the token `level + 1` ahead and says what follows it.
        at_P = row_P + level + 1
        counts_BP = alive_BP & usable_BT[:, at_P]
        entropy_BP = -(probability_BTU[:, at_P] * log_softmax(logits_BPU, -1)).sum(-1)
        losses.append((entropy_BP * counts_BP).sum() / num_chains)
        alive_BP = alive_BP & (kept_U[logits_BPU.argmax(-1)] == best_BT[:, at_P])
        reached.append(alive_BP.sum() / num_chains)
    return Drafted(torch.stack(losses).sum(), torch.stack(reached))


def _language_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Next-token loss, except for bos."""
    next_BT = ids_BT[:, 1:].masked_fill(ids_BT[:, 1:] == BOS_ID, -100)
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), next_BT.flatten())
