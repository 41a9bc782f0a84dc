"""Routed experts of Llama 4, FP8 or not: the distinct experts of a step are the bytes.

Row t goes to expert t modulo the given number of distinct experts, so that the bytes are known: one
for all rows (clustered), every row its own (worst), and what uniform routing expects between.
"channel" and "block" are FP8 weights with a scale per output channel or per 128 x 128 block; the
time is that of the whole op, quantisation and SwiGLU included. A CPU gets 4 experts of width 512.
Peers: torch's grouped product, a loop of its scaled products, transformers' Llama 4.

    python -m bench.kernels.experts     transformers' dense experts against the reference, CPU

transformers computes every expert for every row; the reference computes those that were chosen.
"""

import json
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aerie.kernels.expert_matrix import ExpertMatrix, block_shape
from aerie.kernels.experts import experts, experts_ref
from aerie.kernels.quantize import FP8
from aerie.kernels.router import Routing, router_ref
from bench.shapes import ON_GPU, D, E, F
from bench.timer import Work

GPU_CASES = [(1, 1), (4, 4), (8, 6), (8, 8), (16, 10), (32, 14), (64, 16), (8192, 16)]
CASES = GPU_CASES if ON_GPU else [(1, 1), (8, 4)]
PROVIDERS = {"triton": experts, "eager": experts_ref}
ROUNDS = 7
LEAST_RATIO = 8  # of transformers' dense loop to the eager experts


def make_matrix(outputs: int, inputs: int, scales: str, device, dtype) -> ExpertMatrix:
    weight = torch.randn(E, outputs, inputs, device=device, dtype=dtype).mul_(inputs**-0.5)
    if scales == "none":
        return ExpertMatrix(weight)
    shape = (E, outputs, 1) if scales == "channel" else block_shape(weight)
    factor = 448 / 6  # six standard deviations
    codes = weight.mul_(factor * inputs**0.5).clamp_(-448, 448).to(FP8)
    return ExpertMatrix(codes, torch.full(shape, inputs**-0.5 / factor, device=device))


@pytest.mark.parametrize("scales", ["none", "channel", "block"])
@pytest.mark.parametrize(("rows", "distinct"), CASES)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_experts(provider, rows, distinct, scales, measure, device, dtype):
    x, shared = torch.randn(2, rows, D, device=device, dtype=dtype)
    gate_up = make_matrix(2 * F, D, scales, device, dtype)
    down = make_matrix(D, F, scales, device, dtype)
    ids = (torch.arange(rows, device=device, dtype=torch.int32) % distinct)[:, None]
    routing = Routing(ids, torch.full((rows, 1), 0.5, device=device, dtype=dtype))
    moved = 3 * rows * D * x.element_size()  # rows and the shared part in, their sum out
    size = 3 * distinct * D * F * gate_up.weight.element_size()
    work = Work(bytes=size + moved, flops=6 * rows * D * F)
    measure(provider, work, PROVIDERS[provider], x, routing, gate_up, down, shared)


@pytest.mark.skipif(ON_GPU, reason="of the eager backend on a CPU")
def bench_dense_loop(benchmark, environment):
    """One row, 16 experts, float32: the chosen expert against transformers' loop over all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measured = benchmark.pedantic(against_dense, rounds=1)
    torch.set_num_threads(threads)
    benchmark.extra_info |= environment | measured
    assert measured["experts_ratio"] >= LEAST_RATIO, measured


def cpu_seconds(call: Callable[[], Tensor]) -> float:
    """Shortest CPU time of one call on one thread."""
    call()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def against_dense(experts: int = 16, hidden: int = 1024, width: int = 1024) -> dict[str, float]:
    """CPU seconds of one row: transformers' Llama4TextMoe and our reference on its weights."""
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_local_experts=experts,
        num_experts_per_tok=1,
    )
    moe = Llama4TextMoe(config)
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.02)
    x = torch.randn(1, hidden)
    stored = moe.experts.gate_up_proj.data, moe.experts.down_proj.data
    gate_up, down = (ExpertMatrix(weight.mT.contiguous()) for weight in stored)

    def chosen() -> Tensor:
        routing = router_ref(moe.router(x)[1], 1)
        return experts_ref(x, routing, gate_up, down, moe.shared_expert(x))

    with torch.inference_mode():
        torch.testing.assert_close(chosen(), moe(x)[0], atol=1e-5, rtol=1e-3)
        routing = router_ref(moe.router(x)[1], 1)
        scores = torch.zeros(1, experts).scatter_(1, routing.ids_TA.long(), routing.scores_TA)
        dense_input = x.repeat(experts, 1) * scores.T.reshape(-1, 1)
        dense, ours = cpu_seconds(lambda: moe(x)[0]), cpu_seconds(chosen)
        experts_dense = cpu_seconds(lambda: moe.experts(dense_input))
        experts_ours = cpu_seconds(lambda: experts_ref(x, routing, gate_up, down))
    return {
        "experts": experts,
        "hidden": hidden,
        "width": width,
        "transformers_block_s": dense,
        "our_block_s": ours,
        "block_ratio": dense / ours,
        "transformers_experts_s": experts_dense,
        "our_experts_s": experts_ours,
        "experts_ratio": experts_dense / experts_ours,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(against_dense(), indent=1))
