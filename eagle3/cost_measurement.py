"""What a pass costs on this machine, measured when a pair is loaded: the tables of `width`.

Passes of the real target and draft behind a short context, so attention's share is that of short
texts. Times are host clock from launch to the read of a result, as the loop sees them.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median

import torch

from aerie.eagle3.batch_costs import BatchCosts
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.graphs import size_classes
from aerie.eagle3.width import RoundCosts
from aerie.kernels.tree_rows import MAX_TREE_ROWS
from aerie.llama4.device_steps import chain_shape, device_step
from aerie.llama4.model import Llama4ForCausalLM

SIZES = (*range(1, 9), 12, 16, 24, 32, 48, MAX_TREE_ROWS)  # rows of every sequence
CONTEXT = 64  # rows of every sequence behind which a pass is timed
BUDGET_S, MOST_REPEATS = 1.5, 9

Pass = tuple[int, int]  # sequences, and rows of each in the target; 0: a level of the draft
Clock = Callable[[], float]


@torch.inference_mode()
def measured_costs(
    target: Llama4ForCausalLM,
    draft: Eagle3Llama4ForCausalLM,
    num_rows: int,
    max_sequences: int = 1,
    clock: Clock = time.perf_counter,
) -> BatchCosts:
    """The costs of rounds of up to `num_rows` drafted nodes behind each of up to `max_sequences`
    roots, in less than two seconds.

    What the budget leaves no time for is left out: rows between two sizes cost what the larger one
    does, and more sequences than the tables know are drafted for in full.
    """
    sizes = [size for size in SIZES if size < num_rows + 1] + [min(num_rows + 1, SIZES[-1])]
    batches = size_classes(max_sequences)
    verify = _verify_passes(target, sizes[-1], batches[-1])
    level = _draft_levels(draft, batches[-1])
    calls: dict[Pass, Callable[[], None]] = {
        (sequences, rows): (
            (lambda n=sequences, rows=rows: verify(n, rows))
            if rows > 0
            else (lambda n=sequences: level(n))
        )
        for sequences, rows in _passes(sizes, batches)
    }
    return _tables(timed(calls, clock))


def _passes(sizes: list[int], batches: list[int]) -> list[Pass]:
    """What matters most first: of every batch the draft, plain decoding and the widest pass."""
    ends = sorted({0, sizes[0], sizes[-1]})
    between = sorted(sizes[1:-1], key=lambda size: (size & (size - 1) != 0, size))
    first = [(sequences, rows) for sequences in batches for rows in ends]
    return first + [(sequences, rows) for rows in between for sequences in batches]


def timed(calls: Mapping[Pass, Callable[[], None]], clock: Clock) -> dict[Pass, list[float]]:
    """Milliseconds of every call, as often as `BUDGET_S` allows; those of one sequence that come
    before any other's are made at least once."""
    times: dict[Pass, list[float]] = {}
    start = clock()
    for repeat in range(MOST_REPEATS):
        for name, call in calls.items():
            is_needed = repeat == 0 and all(sequences == 1 for sequences, _ in (name, *times))
            if not is_needed and clock() - start > BUDGET_S:
                return times
            before = clock()
            call()
            times.setdefault(name, []).append(1e3 * (clock() - before))
    return times


def _tables(times: Mapping[Pass, list[float]]) -> BatchCosts:
    """A first pass allocates, and compiles kernels: it counts where there was no second. More rows
    are taken to cost at least what fewer do."""
    tables = {}
    for sequences in sorted({sequences for sequences, _ in times}):
        own = {rows: median(ms[1:] or ms) for (n, rows), ms in times.items() if n == sequences}
        if 0 in own and 1 in own:
            level_ms = own.pop(0)
            tables[sequences] = RoundCosts(dict(_rising(own.items())), level_ms)
    return BatchCosts(tables)


def _rising(times: Iterable[tuple[int, float]]) -> Iterable[tuple[int, float]]:
    at_least = 0.0
    for rows, ms in sorted(times):
        at_least = max(at_least, ms)
        yield rows, at_least


def _verify_passes(
    target: Llama4ForCausalLM, most_rows: int, most_sequences: int
) -> Callable[[int, int], None]:
    device = target.lm_head.weight.device
    cache = target.allocate_cache(CONTEXT + most_rows, most_sequences)
    lengths_B = torch.full((most_sequences,), CONTEXT, device=device)
    ids_T = torch.arange(most_rows * most_sequences, device=device) % target.config.vocab_size

    def verify(sequences: int, rows: int) -> None:
        step = device_step(cache, lengths_B[:sequences], chain_shape(rows, device))
        target(ids_T[: sequences * rows], step).logits_TV.argmax(-1).tolist()

    return verify


def _draft_levels(draft: Eagle3Llama4ForCausalLM, most_sequences: int) -> Callable[[int], None]:
    weight = draft.lm_head.weight
    cache = draft.allocate_cache(CONTEXT + 1, most_sequences)
    lengths_B = torch.full((most_sequences,), CONTEXT, device=weight.device)
    hidden_BD = weight.new_zeros(most_sequences, weight.shape[1])
    ids_B = torch.zeros_like(lengths_B)

    def level(sequences: int) -> None:
        step = device_step(cache, lengths_B[:sequences], chain_shape(1, weight.device))
        output = draft(ids_B[:sequences], hidden_BD[:sequences], step)
        draft.top_tokens(output.post_norm_TD, 1).ids_TA.tolist()

    return level
