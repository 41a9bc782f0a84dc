"""All providers of one case, timed in turns: our kernel, its reference, and their rivals.

The reference is there twice, as it is and through `torch.compile` in its default mode; peers come
from `bench/peers.py`. Every provider must first agree with the reference on these very inputs: a
wrong answer has no time, nor has a kernel of ours that does not repeat its bits. Ours failing is an
error; a rival that fails is a skipped row with reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import Any

import torch

from bench.ceilings import Ceilings
from bench.copies import cache_bytes, copied, copies_for, held_bytes, is_cold, tensors
from bench.environment import clocks
from bench.graphs import graph_timer, launches
from bench.peers import PEERS
from bench.repeats import RUNS, run_that_differs
from bench.timer import Timer, Work, host_timer, interleaved, summary

LARGEST_DIFFERENCE = (
    0.03  # relative, in norm: other roundings of bfloat16 pass, other maths does not
)
OURS, SHOTS = ("triton", "eager"), 3


@dataclass(frozen=True)
class Contender:
    """A provider's function with its arguments; `prepare` turns a copy of these into its own."""

    op: Callable
    args: tuple
    prepare: Callable[..., tuple] = lambda *args: args


def with_rivals(op_name: str, ours: dict[str, Contender]) -> dict[str, Contender | str]:
    """`ours` and, beside an eager reference, its compiled form and the peers (or why not)."""
    everyone: dict[str, Contender | str] = dict(ours)
    if (eager := ours.get("eager")) is None:
        return everyone
    everyone["compile"] = Contender(_compiled(eager.op), eager.args)
    for name, load in PEERS.get(op_name, {}).items():
        try:
            peer = load()
            everyone[name] = Contender(peer.op, eager.args, peer.prepare)
        except ImportError as error:
            everyone[name] = f"skipped: {error}"
    return everyone


def _compiled(op: Callable) -> Callable:
    """`op` through `torch.compile`, which must not fall back to eager when cases are many."""
    config: Any = import_module("torch._dynamo.config")
    config.recompile_limit, config.fail_on_recompile_limit_hit = 64, True
    return torch.compile(op)


def compare(
    everyone: dict[str, Contender | str], work: Work, ceilings: Ceilings, device: torch.device
) -> dict[str, dict]:
    """The measured part of a row for every provider; for one without a time, its `status`."""
    eager = everyone.get("eager")
    expected = answer(eager) if isinstance(eager, Contender) else None
    rows, timers = {}, {}
    for name, contender in everyone.items():
        rows[name], timer = _entered(name, contender, work, device, expected)
        if timer is not None:
            timers[name] = timer
    for name, samples in interleaved(timers).items():
        rows[name] |= summary(samples) | {"samples": len(samples)}
        rows[name]["single_shot_us"] = median(timers[name].single_shot() for _ in range(SHOTS))
        rows[name] |= rates(rows[name]["median_us"], work, ceilings)
    now = clocks(device)
    return {name: row | {"clocks": now} for name, row in rows.items()}


def _entered(
    name: str, contender: Contender | str, work: Work, device: torch.device, expected: list | None
) -> tuple[dict, Timer | None]:
    """The row's beginning and the timer of a provider that may compete."""
    if isinstance(contender, str):
        return {"status": contender}, None
    try:
        if expected is not None and (wrong := disagreement(answer(contender), expected)):
            return {"status": f"refused: {wrong}"}, None
        if name == "triton" and (run := _run_that_differs(contender)) is not None:
            return {"status": f"refused: run {run} of {RUNS} gave other bits than run 0"}, None
        return _timed(contender, work, device)
    except Exception as error:
        if name in OURS:
            raise
        reason = str(error).strip().splitlines() or [""]
        return {"status": f"skipped: {type(error).__name__}: {reason[0][:80]}"}, None


def _run_that_differs(contender: Contender) -> int | None:
    return run_that_differs(contender.op, contender.prepare(*copied(contender.args)))


def _timed(contender: Contender, work: Work, device: torch.device) -> tuple[dict, Timer]:
    cache = cache_bytes(device)
    count = copies_for(work.bytes, held_bytes(contender.args), cache, device)
    copies = [contender.prepare(*copied(contender.args)) for _ in range(count)]
    flush, on_gpu = torch.empty(2 * cache, dtype=torch.uint8, device=device), device.type == "cuda"
    timer = (graph_timer if on_gpu else host_timer)(contender.op, copies, flush)
    row = {
        "status": "ok",
        "timing": timer.how,
        "copies": count,
        "cold": is_cold(work.bytes, count, cache),
        "launches": launches(contender.op, copies[0]) if on_gpu else None,
    }
    return row, timer


def rates(median_us: float, work: Work, ceilings: Ceilings) -> dict[str, float]:
    """What the time means: rates over the counted work, and nearness to the two floors."""
    floor = ceilings.floor_us(work)
    return {
        "bytes": work.bytes,
        "flops": work.flops,
        "gb_s": work.bytes / median_us / 1e3,
        "tflop_s": work.flops / median_us / 1e6,
        "floor_us": floor,
        "percent_of_floor": 100 * floor / median_us,
        "percent_of_read": 100 * work.bytes / median_us / 1e3 / ceilings.read_gb_s,
    }


def answer(contender: Contender) -> list[torch.Tensor]:
    """What one call gives; of a call that returns nothing, its arguments after it."""
    args = contender.prepare(*copied(contender.args))
    returned = contender.op(*args)
    return [x.clone() for x in tensors(args if returned is None else returned)]


def disagreement(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> str:
    """Why `ours` is not `expected`, or nothing. Integers count only where nothing else is there."""
    if [x.shape for x in ours] != [x.shape for x in expected]:
        return f"shapes {[tuple(x.shape) for x in ours]} are not eager's"
    pairs = list(zip(ours, expected, strict=True))
    floats = [pair for pair in pairs if pair[1].is_floating_point()]
    worst = max(map(_difference, floats or pairs), default=0.0)
    return "" if worst <= LARGEST_DIFFERENCE else f"differs from eager by {worst:.2g}"


def _difference(pair: Iterable[torch.Tensor]) -> float:
    """Relative error in norm; infinite where anything is NaN."""
    ours, expected = (x.double() for x in pair)
    error = (ours - expected).norm() / expected.norm().clamp_min(1e-30)
    return float("inf") if error.isnan() else error.item()
