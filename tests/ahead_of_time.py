"""Compiles every kernel for a GPU that is not there: `python tests/ahead_of_time.py cuda:90`.

Each public op is called once on CPU tensors of Llama 4's widths, with the launch replaced by a
compilation of exactly that launch: same constexprs, options, argument types and alignment. Prints
one JSON object per kernel. Runs in a process of its own, as the interpreter must be off.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aerie.kernels import (
    accept,
    argmax,
    attention_temperature,
    aux_projection,
    cache_commit,
    draft_vocab,
    embedding,
    experts,
    kv_append,
    linear,
    rms_norm,
    rope,
    rotation,
    router,
    swiglu,
    tree_attention,
)

TARGETS = {"cuda:90": GPUTarget("cuda", 90, 32), "hip:gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
T, H, G, K, D, F = 5, 40, 8, 128, 5120, 256  # a verify step of five rows; experts cut to 256


def argument_type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), f"no kernel takes a {type(value).__name__}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def is_aligned(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def compile_launch(kernel, target: GPUTarget, arguments: tuple, named: dict) -> None:
    """What `kernel[grid](*arguments, **named)` would have compiled on `target`."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: value for name, value in named.items() if name in kernel.arg_names}
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else argument_type(values[name])
        for name in kernel.arg_names
    }
    aligned = {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if p.name not in constants and not p.do_not_specialize and is_aligned(values[p.name])
    }
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, positions, aligned)
    compiled = triton.compile(source, target=target, options=options)
    binary = "cubin" if target.backend == "cuda" else "hsaco"
    size, shared = len(compiled.asm[binary]), compiled.metadata.shared
    print(json.dumps({"kernel": kernel.__name__, "bytes": size, "shared": shared}), flush=True)


def calls() -> dict[str, Callable[[], object]]:
    """One call of every op, by the name of its module."""
    x, residual, weight = bf16(T, D), bf16(T, D), bf16(D)
    q, k, cache = bf16(T, H, K), bf16(T, G, K), bf16(4, 64, G, K)
    ids, positions = torch.zeros(T, dtype=torch.int64), torch.arange(T)
    starts, lengths = torch.tensor([0, T], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    angles = rotation.Rotation(torch.zeros(T, K // 2), torch.zeros(T, K // 2))
    routing = router.Routing(torch.zeros(T, 1, dtype=torch.int32), bf16(T, 1))
    table = torch.zeros(1, 4, dtype=torch.int32)
    rows = tree_attention.TreeRows(positions, starts, lengths, table, ids, T)
    layers = bf16(2, 4, 64, G, K)
    d2t = torch.zeros(1024, dtype=torch.int64)
    return {
        "accept": lambda: accept.accept(ids, ids, ids, starts, T),
        "argmax": lambda: argmax.argmax(bf16(T, 202048)),
        "attention_temperature": lambda: attention_temperature.attention_temperature(
            q, positions, 8192.0, 0.1
        ),
        "aux_projection": lambda: aux_projection.aux_projection([x] * 3, bf16(256, 3 * D)),
        "cache_commit": lambda: cache_commit.cache_commit(layers, layers, ids, ids),
        "draft_vocab": lambda: draft_vocab.draft_vocab(x, bf16(1024, D), d2t, 4),
        "embedding": lambda: embedding.embedding(ids, bf16(64, D)),
        "experts": lambda: experts.experts(x, routing, bf16(2, D, 2 * F), bf16(2, F, D), x),
        "kv_append": lambda: kv_append.kv_append(k, k, cache, cache, ids),
        "linear": lambda: linear.linear(x, bf16(256, D)),
        "rms_norm": lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-5),
        "rope": lambda: rope.rope(q, k, angles, "interleaved", 1e-5),
        "rotation": lambda: rotation.rotation(positions, torch.zeros(K // 2)),
        "router": lambda: router.router(bf16(T, 16), 1),
        "swiglu": lambda: swiglu.swiglu(bf16(T, 8192), bf16(T, 8192)),
        "tree_attention": lambda: tree_attention.tree_attention(q, cache, cache, rows, 8192, 0.1),
    }


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def main(target: GPUTarget) -> None:
    def launcher(kernel, grid):
        return lambda *arguments, **named: compile_launch(kernel, target, arguments, named)

    with patch.object(triton.JITFunction, "__getitem__", launcher):
        for name, call in calls().items():
            module = import_module(f"aerie.kernels.{name}")
            with patch.object(module, "check_launchable", lambda x: None):
                call()


if __name__ == "__main__":
    main(TARGETS[sys.argv[1]])
