"""Rules that change the logits of every verified row by the row's own prefix.

A rule sees all rows of a pass at once, [T, V] float32, and changes a row by nothing but that row
and its prefix: so a token is judged alike whether its position is verified in a tree or decoded
alone. All but custom processors stay on the device. On one rank of several a row has that rank's
columns, `own_ids`; a rule changes those and leaves the others to the other ranks.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from aerie.eagle3.prefixes import Prefixes
from aerie.eagle3.sampling import LogitsProcessor, SamplingParams

Rule = Callable[[Tensor, Prefixes], Tensor]


def rules_of(
    params: SamplingParams, end_ids: Iterable[int], own_ids: range, device: torch.device
) -> list[Rule]:
    """The rules that `params` switches on, in the order of `sampling`."""
    rules: list[Rule] = []
    bias = {own_ids.index(v): x for v, x in params.logit_bias.items() if v in own_ids}
    if bias:
        bias_V = torch.zeros(len(own_ids), device=device)
        bias_V[list(bias)] = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        rules.append(lambda logits_TV, _: logits_TV + bias_V)
    words = [word for word in params.bad_words_ids if word[-1] in own_ids]
    rules += [_bad_word(word[:-1], own_ids.index(word[-1]), device) for word in words]
    ends = sorted(own_ids.index(v) for v in {*end_ids, *params.stop_token_ids} if v in own_ids)
    if params.min_tokens > 0 and ends:
        rules.append(_min_tokens(params.min_tokens, torch.tensor(ends, device=device)))
    if params.repetition_penalty != 1.0:
        rules.append(_repetition_penalty(params.repetition_penalty, own_ids))
    if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        penalties = params.presence_penalty, params.frequency_penalty
        rules.append(_output_penalties(*penalties, own_ids))
    rules += [_custom(processor) for processor in params.logits_processors]
    return rules


def _bad_word(beginning: Sequence[int], last: int, device: torch.device) -> Rule:
    """`last` is a column, behind tokens."""
    begin = torch.tensor(list(beginning), dtype=torch.int64, device=device)

    def rule(logits_TV: Tensor, prefixes: Prefixes) -> Tensor:
        banned_TV = torch.zeros_like(logits_TV)
        if len(begin) == 0:
            banned_TV[:, last] = -torch.inf
        else:
            is_begun_T = (prefixes.last_tokens(len(begin)) == begin).all(dim=1)
            banned_TV[:, last] = torch.where(is_begun_T, -torch.inf, 0.0)
        return logits_TV + banned_TV

    return rule


def _min_tokens(count: int, ends: Tensor) -> Rule:
    def rule(logits_TV: Tensor, prefixes: Prefixes) -> Tensor:
        is_early_T = prefixes.num_output_T < count
        banned_T1 = torch.where(is_early_T, -torch.inf, 0.0)[:, None]
        return logits_TV.index_add(1, ends, banned_T1.expand(-1, len(ends)).to(logits_TV.dtype))

    return rule


def _repetition_penalty(penalty: float, own_ids: range) -> Rule:
    def rule(logits_TV: Tensor, prefixes: Prefixes) -> Tensor:
        is_seen_TV = _counts(prefixes, 0, own_ids, logits_TV.dtype) > 0
        scaled_TV = torch.where(logits_TV > 0, logits_TV / penalty, logits_TV * penalty)
        return torch.where(is_seen_TV, scaled_TV, logits_TV)

    return rule


def _output_penalties(presence: float, frequency: float, own_ids: range) -> Rule:
    def rule(logits_TV: Tensor, prefixes: Prefixes) -> Tensor:
        counts_TV = _counts(prefixes, prefixes.num_prompt, own_ids, logits_TV.dtype)
        return logits_TV - frequency * counts_TV - presence * (counts_TV > 0)

    return rule


def _counts(prefixes: Prefixes, first: int, own_ids: range, dtype: torch.dtype) -> Tensor:
    """How often each of `own_ids` stands at known positions from `first` on and on a row's path."""
    rows, elsewhere = len(prefixes.tokens_T), len(own_ids)  # a column for all other ids

    def columns(ids: Tensor) -> Tensor:
        is_own = (ids >= own_ids.start) & (ids < own_ids.stop)
        return torch.where(is_own, ids - own_ids.start, elsewhere)

    is_known_S = prefixes.known_since(first).to(dtype)
    known_V = is_known_S.new_zeros(elsewhere + 1)
    known_V.scatter_add_(0, columns(prefixes.ids_S), is_known_S)
    tokens_TT = columns(prefixes.tokens_T).expand(rows, rows)
    drafted_TT = prefixes.drafted_TT().to(dtype)
    counts_TV = known_V.expand(rows, -1).clone().scatter_add_(1, tokens_TT, drafted_TT)
    return counts_TV[:, :elsewhere]


def _custom(processor: LogitsProcessor) -> Rule:
    """Rows of one depth have prefixes of one length: they are one call. Reads the device."""

    def rule(logits_TV: Tensor, prefixes: Prefixes) -> Tensor:
        result_TV = logits_TV.clone()
        depths = prefixes.depths_T.tolist()
        for depth in sorted(set(depths)):
            rows = [row for row, other in enumerate(depths) if other == depth]
            result_TV[rows] = _processed(processor, prefixes.whole(depth), logits_TV[rows])
        return result_TV

    return rule


def _processed(processor: LogitsProcessor, ids: Tensor, scores_TV: Tensor) -> Tensor:
    result = processor(ids, scores_TV)
    if not isinstance(result, Tensor) or result.shape != scores_TV.shape:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"logits_processors: {processor!r} must return scores {tuple(scores_TV.shape)}, "
            f"got {shape}"
        )
    return result
