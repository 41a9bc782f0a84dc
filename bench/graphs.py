"""Times calls inside a captured CUDA graph, so that neither Python nor the launch path counts.

A call that reads a device value on the host (an eager reference may) cannot be captured; it is
timed between events, and its row says so.
"""

from collections.abc import Callable, Sequence

import torch
from torch import cuda
from torch.profiler import ProfilerActivity, profile

from bench.timer import Timer, calls_for

TARGET_US = 3000.0  # of one replay: far above the resolution of an event


def graph_timer(op: Callable, copies: Sequence[tuple], flush: torch.Tensor) -> Timer:
    """Times `op` over `copies` of its arguments in a graph, or between events if it syncs.

    Filling `flush` empties the cache.
    """
    for args in copies:  # compiles, and fills what a call memoises on its arguments
        op(*args)
    walk = _walk(op, copies, len(copies))
    calls = calls_for(elapsed_us(walk) / len(copies), len(copies), TARGET_US)
    how, once, run = "graph", _walk(op, copies, 1), _walk(op, copies, calls)
    try:
        _check_no_sync(once)
        once, run = captured(once), captured(run)
    except RuntimeError as error:
        how = f"events ({str(error).splitlines()[0][:60]})"

    def single_shot() -> float:
        flush.zero_()
        return elapsed_us(once)

    run()
    return Timer(how, lambda: elapsed_us(run) / calls, single_shot)


def _walk(op: Callable, copies: Sequence[tuple], calls: int) -> Callable[[], None]:
    def run() -> None:
        for i in range(calls):
            op(*copies[i % len(copies)])

    return run


def _check_no_sync(call: Callable[[], None]) -> None:
    """Raises RuntimeError where `call` waits for the device, before a capture is broken by it."""
    cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """`call` as one graph; what it returns is its replay."""
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        call()
    return graph.replay


def elapsed_us(call: Callable[[], object]) -> float:
    """Device time between two events around `call`."""
    start, stop = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return 1e3 * start.elapsed_time(stop)


def launches(op: Callable, args: tuple) -> int:
    """What one call puts on the device: kernels, copies and fills."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        op(*args)
        cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in seen.events() or ())
