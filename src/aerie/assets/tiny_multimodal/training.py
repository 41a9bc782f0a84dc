"""Teaching the toy task to a target, and then to drafts that see images in one way or the other."""

import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.models.llama4.modeling_llama4 import Llama4ForConditionalGeneration

from aerie.assets.build.draft import Draft, start_as_head
from aerie.assets.build.draft_shape import DraftShape
from aerie.assets.build.optimizer import Optimizer
from aerie.assets.build.tokenizer import PAD_ID
from aerie.assets.tiny_multimodal.checkpoint import TEXT, new_model
from aerie.assets.tiny_multimodal.task import Rows, draw, rows
from aerie.eagle3.reading import DraftMultimodal

BATCH = 16
DEPTH = 4
TARGET_STEPS, DRAFT_STEPS = 120, 100
INPUTS: tuple[DraftMultimodal, ...] = ("merged", "text")
RATE = 1e-2
LAYERS = TEXT["num_hidden_layers"]
SHAPE = DraftShape(
    vocab_size=TEXT["vocab_size"],
    draft_vocab_size=TEXT["vocab_size"],
    hidden_size=TEXT["hidden_size"],
    intermediate_size=2 * TEXT["hidden_size"],
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    taps=(2, LAYERS // 2, LAYERS - 3),
)


def train_target(seed: int, steps: int = TARGET_STEPS) -> Llama4ForConditionalGeneration:
    """A new model that answers the question."""
    torch.manual_seed(seed)
    model = new_model()
    optimizer = Optimizer([model])
    for step, batch in _batches(seed, steps):
        logits = model(batch.ids, pixel_values=batch.pixel_values).logits
        loss = _loss(logits[:, batch.prompt_length - 1 : -1], batch.ids[:, batch.prompt_length :])
        loss.backward()
        optimizer.step(_rate(step, steps))
        _report("target", step, steps, loss)
    return model.eval().requires_grad_(False)


def train_draft(
    model: Llama4ForConditionalGeneration,
    draft_multimodal: DraftMultimodal,
    seed: int,
    steps: int = DRAFT_STEPS,
) -> Draft:
    """A new draft that is shown image features, or only the placeholders' embeddings."""
    torch.manual_seed(seed + 1)
    draft = Draft(torch.arange(SHAPE.vocab_size), SHAPE)
    text = model.language_model
    start_as_head(draft, text.lm_head.weight, text.model.norm.weight)
    optimizer = Optimizer([draft])
    for step, batch in _batches(seed + 1, steps):
        out = model(batch.ids, pixel_values=batch.pixel_values, output_hidden_states=True)
        taps = torch.cat([out.hidden_states[layer] for layer in SHAPE.taps], -1)
        is_merged = draft_multimodal == "merged"
        embeds = out.hidden_states[0] if is_merged else model.get_input_embeddings()(batch.ids)
        # a chain starts at every row whose next token is the answer's
        starts = torch.arange(batch.prompt_length - 1, batch.ids.shape[1] - 1 - DEPTH)
        levels = draft.unroll(taps, embeds, starts, DEPTH)
        losses = [_loss(x, batch.ids[:, starts + 2 + level]) for level, x in enumerate(levels)]
        torch.stack(losses).sum().backward()
        optimizer.step(_rate(step, steps))
        _report(f"draft ({draft_multimodal})", step, steps, losses[0])
    return draft


def _batches(seed: int, steps: int) -> Iterator[tuple[int, Rows]]:
    random = torch.Generator().manual_seed(seed)
    for step in range(steps):
        yield step, rows(draw(BATCH, random), random)


def _loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return cross_entropy(logits_BTV.flatten(0, 1), ids_BT.flatten(), ignore_index=PAD_ID)


def _rate(step: int, steps: int) -> float:
    return RATE * min(1.0, (step + 1) / 10) * (1 - step / steps)


def _report(name: str, step: int, steps: int, loss: Tensor) -> None:
    if step % 50 == 0 or step + 1 == steps:
        print(f"{name} {step} {loss.item():.3f} {time.process_time():.0f}s", file=sys.stderr)
