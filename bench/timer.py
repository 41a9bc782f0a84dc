"""Work of a call, samples of its time, and their summary: what CPU and GPU timings share.

A sample is the mean time of one call over a run of calls that walk through rotated copies of the
inputs (`bench/copies.py`), so that a call does not find its inputs in the cache because it has just
read them. Providers are sampled in turns and in random order: what else the machine does hits all.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

import torch

ROUNDS, SAMPLES, SLOW_US = 3, 5, 20_000.0  # rounds, samples of each round, one of a slow call


@dataclass(frozen=True)
class Work:
    """What one call must do at least: bytes from and to memory, floating-point operations."""

    bytes: int
    flops: int = 0
    fp8_products: bool = False  # both operands of the products are FP8: the FP8 rate is the ceiling


@dataclass(frozen=True)
class Timer:
    """Two ways to time one provider; both give microseconds of one call."""

    how: str
    sample: Callable[[], float]  # inputs rotated
    single_shot: Callable[[], float]  # one call, the cache flushed before it
    samples: int = SAMPLES  # of each round


def interleaved(timers: dict[str, Timer], seed: int = 0) -> dict[str, list[float]]:
    """Samples of every timer: `ROUNDS` rounds, each in a new random order."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    order, shuffle = list(timers), random.Random(seed).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for name in order:
            timer = timers[name]
            samples[name] += [timer.sample() for _ in range(timer.samples)]
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile: a mean would carry every interruption."""
    p20, _, _, p80 = quantiles(samples, n=5, method="inclusive")
    return {"median_us": median(samples), "p20_us": p20, "p80_us": p80}


def host_timer(op: Callable, copies: Sequence[tuple], flush: torch.Tensor) -> Timer:
    """Times `op` on the CPU by the host's clock; filling `flush` empties the cache."""
    for args in copies:
        op(*args)

    def run(calls: int) -> float:
        start = perf_counter()
        for i in range(calls):
            op(*copies[i % len(copies)])
        return 1e6 * (perf_counter() - start) / calls

    def single_shot() -> float:
        flush.zero_()
        return run(1)

    call_us = run(len(copies))
    calls = calls_for(call_us, len(copies), target_us=2000)
    samples = SAMPLES if call_us < SLOW_US else 1
    return Timer("host clock", lambda: run(calls), single_shot, samples)


def calls_for(call_us: float, copies: int, target_us: float, most: int = 256) -> int:
    """Calls of a sample: whole walks through the copies, about `target_us` together."""
    walks = round(target_us / max(call_us, 1e-3) / copies)
    return copies * min(max(1, walks), max(1, most // copies))
