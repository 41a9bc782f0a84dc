"""How well a draft follows its target: every position of a known text is a start of a chain.

A generation measures acceptance only where a round happens to start, and a draft that is one layer
off loses little of it. Here the target first writes a text; then the draft predicts, from each of
its positions, the tokens that the target did write. That gives acceptance by position from every
start, and a finer measure: the log-probability of the target's tokens, which moves where the
accepted tokens do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.engine import PREFILL_ROWS
from aerie.eagle3.generate import generate
from aerie.kernels.head_rows import ids_from_offsets
from aerie.llama4.model import Llama4ForCausalLM

MAX_POSITIONS = 4  # every start has the target's tokens for so many
FLOOR = -10.0  # log-probability of a token the draft cannot say, and the least one counted


@dataclass(frozen=True)
class Transcript:
    """A prompt and the target's greedy continuation, with the streams a draft may tap.

    `taps` holds, for the input of each recorded layer, the rows of all tokens but the last one.
    """

    ids: tuple[int, ...]
    prompt_length: int
    taps: dict[int, Tensor]


@dataclass(frozen=True)
class Measured:
    """One row per start, one column per drafted position: did the draft's first choice match the
    target's token, and how likely did the draft find it."""

    hits_NP: Tensor
    log_probs_NP: Tensor

    @property
    def acceptance(self) -> list[float]:
        """Share of the starts accepted up to position i (unconditional)."""
        return self.hits_NP.cumprod(1).double().mean(0).tolist()

    @property
    def conditional_acceptance(self) -> list[float]:
        """Share of the starts accepted up to position i - 1 that were accepted at i too."""
        reached = [1.0, *self.acceptance[:-1]]
        return [a / r if r else 0.0 for a, r in zip(self.acceptance, reached, strict=True)]

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per draft, bonus token included."""
        return 1 + sum(self.acceptance)

    @property
    def log_prob(self) -> float:
        """Mean log-probability of the target's tokens."""
        return float(self.log_probs_NP.mean())


def transcribe(
    target: Llama4ForCausalLM, prompt_ids: Sequence[int], num_tokens: int, layers: set[int]
) -> Transcript:
    """Lets the target continue the prompt and records the inputs of `layers`."""
    ids = [*prompt_ids, *generate(target, prompt_ids, num_tokens, eos_token_ids=()).tokens]
    chosen = tuple(sorted(layers))
    cache, device = target.allocate_cache(len(ids)), target.lm_head.weight.device
    known_T = torch.tensor(ids[:-1], device=device)
    parts: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for part_T in known_T.split(PREFILL_ROWS):
            last_row = torch.tensor([len(part_T) - 1], device=device)
            step = cache.causal_step(len(part_T))
            output = target(part_T, step, last_row, aux_layers=chosen)
            cache.commit(0, range(len(part_T)))
            parts.append(output.aux_hidden_states)
    streams = [torch.cat(rows) for rows in zip(*parts, strict=True)]
    return Transcript(tuple(ids), len(prompt_ids), dict(zip(chosen, streams, strict=True)))


@torch.inference_mode()
def measure(
    draft: Eagle3Llama4ForCausalLM,
    layers: tuple[int, ...],
    transcripts: Sequence[Transcript],
    num_positions: int,
) -> Measured:
    """Chains of `num_positions` from every start; `layers` are the taps the draft is given."""
    found = [_measure(draft, sorted(layers), t, num_positions) for t in transcripts]
    hits = torch.cat([part.hits_NP for part in found])
    return Measured(hits, torch.cat([part.log_probs_NP for part in found]))


def _measure(
    draft: Eagle3Llama4ForCausalLM, layers: Sequence[int], text: Transcript, num_positions: int
) -> Measured:
    """Row i of the first pass knows token i + 1 and predicts token i + 2. A chain goes on with the
    target's own token, which is what the draft has proposed as long as it is accepted."""
    first = max(text.prompt_length - 2, 0)
    num_starts = len(text.ids) - 1 - MAX_POSITIONS - first
    assert num_positions <= MAX_POSITIONS
    assert num_starts > 0, "the transcript is shorter than one chain"
    ids_T = torch.tensor(text.ids, device=draft.lm_head.weight.device)
    hidden_TD = draft.combine_hidden_states([text.taps[layer] for layer in layers])
    cache = draft.allocate_cache(len(ids_T) + num_positions)
    output = draft(ids_T[1:], hidden_TD, cache.causal_step(len(hidden_TD)))
    cache.commit(0, range(len(hidden_TD)))
    rows = slice(first, first + num_starts)
    levels = [output.post_norm_TD[rows]]
    states = [output.next_hidden_TD[first + i : first + i + 1] for i in range(num_starts)]
    deeper = [
        _deeper_levels(draft, cache, ids_T, states[i], first + i, num_positions)
        for i in reversed(range(num_starts))  # the cache only ever gets shorter
    ]
    levels += [torch.cat(level) for level in zip(*reversed(deeper), strict=True)]
    scored = [
        _score(draft, level, ids_T[first + 2 + depth :][:num_starts])
        for depth, level in enumerate(levels)
    ]
    hits, log_probs = zip(*scored, strict=True)
    return Measured(torch.stack(hits, 1), torch.stack(log_probs, 1))


def _deeper_levels(draft, cache, ids_T, hidden_TD, row: int, num_positions: int) -> list[Tensor]:
    """Normalised states of positions 2 .. of the chain that starts behind `row`."""
    cache.rollback(0, row + 1)
    found: list[Tensor] = []
    for depth in range(1, num_positions):
        token_T = ids_T[row + 1 + depth : row + 2 + depth]
        output = draft(token_T, hidden_TD, cache.causal_step(1))
        cache.commit(0, [0])
        hidden_TD = output.next_hidden_TD
        found.append(output.post_norm_TD)
    cache.rollback(0, row + 1)
    return found


def _score(draft, post_norm_ND: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the first choice is the wanted target id, and that id's log-probability."""
    known_U = ids_from_offsets(draft.d2t)
    log_probs_NU = draft.compute_draft_logits(post_norm_ND).float().log_softmax(-1)
    place_N = torch.searchsorted(known_U, wanted_N).clamp(max=len(known_U) - 1)
    found_N = log_probs_NU.gather(1, place_N[:, None])[:, 0].clamp(min=FLOOR)
    is_known_N = known_U[place_N] == wanted_N
    hits_N = known_U[log_probs_NU.argmax(-1)] == wanted_N
    return hits_N.cpu(), found_N.where(is_known_N, FLOOR).double().cpu()
