"""What a pass costs on this machine, measured when a pair is loaded: the table of `width`.

Passes of the real target and draft behind a short context, so attention's share is that of short
texts. Times are host clock from launch to the read of a result, as the loop sees them.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.width import RoundCosts
from aerie.kernels.tree_rows import MAX_TREE_ROWS
from aerie.llama4.cache import Tree
from aerie.llama4.model import Llama4ForCausalLM

SIZES = (*range(1, 9), 12, 16, 24, 32, 48, MAX_TREE_ROWS)  # rows of one sequence
CONTEXT = 64  # committed rows behind which a pass is timed
BUDGET_S, MOST_REPEATS = 1.5, 9


@torch.inference_mode()
def measured_costs(
    target: Llama4ForCausalLM, draft: Eagle3Llama4ForCausalLM, num_rows: int
) -> RoundCosts:
    """The costs of rounds of up to `num_rows` drafted nodes, in less than two seconds.

    Every size is timed once; the rest of the budget repeats all of them, the median counts. A
    larger size is taken to cost at least what a smaller one does.
    """
    sizes = [size for size in SIZES if size < num_rows + 1] + [min(num_rows + 1, SIZES[-1])]
    verify = _verify_passes(target, max(sizes))
    level = _draft_level(draft)
    calls: dict[int, Callable[[], None]] = {0: level} | {
        size: (lambda size=size: verify(size)) for size in sizes
    }
    times: dict[int, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for call in (calls[0], calls[1]):
        call()  # a first pass allocates, and compiles kernels
    for repeat in range(MOST_REPEATS):
        for name, call in calls.items():
            if repeat > 0 and time.perf_counter() - start > BUDGET_S:
                break
            times[name].append(_ms(call))
    at_least, verify_ms = 0.0, {}
    for size in sizes:
        at_least = verify_ms[size] = max(at_least, median(times[size]))
    return RoundCosts(verify_ms, draft_level_ms=median(times[0]))


def _verify_passes(target: Llama4ForCausalLM, most: int) -> Callable[[int], None]:
    device = target.lm_head.weight.device
    cache = target.allocate_cache(CONTEXT + most)
    ids_T = torch.arange(CONTEXT + most, device=device) % target.config.vocab_size
    last_row = torch.tensor([CONTEXT - 1], device=device)
    target(ids_T[:CONTEXT], cache.causal_step(CONTEXT), last_row)
    cache.commit(0, range(CONTEXT))

    def verify(rows: int) -> None:
        step = cache.tree_step(Tree(tuple(range(-1, rows - 1))))
        target(ids_T[:rows], step).logits_TV.argmax(-1).tolist()

    return verify


def _draft_level(draft: Eagle3Llama4ForCausalLM) -> Callable[[], None]:
    weight = draft.lm_head.weight
    cache = draft.allocate_cache(CONTEXT + 1)
    hidden_TD = weight.new_zeros(CONTEXT, weight.shape[1])
    ids_T = torch.zeros(CONTEXT, dtype=torch.int64, device=weight.device)
    draft(ids_T, hidden_TD, cache.causal_step(CONTEXT))
    cache.commit(0, range(CONTEXT))

    def level() -> None:
        output = draft(ids_T[:1], hidden_TD[:1], cache.causal_step(1))
        draft.top_tokens(output.post_norm_TD, 1).ids_TA.tolist()

    return level


def _ms(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
