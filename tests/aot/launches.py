"""Records what launches would compile, without a GPU, and compiles it for one that is not there.

The public ops run on CPU tensors with the launch itself replaced, so every constexpr, option,
argument type and alignment is what the launch rules of the package really choose.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend

from aerie.kernels.target import Target

KERNELS = Path(__file__).parents[2] / "kernels"
READER = hashlib.sha256(Path(__file__).with_name("machine_code.py").read_bytes()).hexdigest()
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",  # pairs of FP8
    torch.bool: "*i1",
}


@dataclass
class Variant:
    """One compilation: a kernel with its constants, options and types; and who asks for it."""

    kernel: str
    kind: str
    source: ASTSource
    options: dict[str, object]
    constants: dict[str, object]
    rows: list[int] = field(default_factory=list)

    def compile(self, target: GPUTarget) -> CompiledKernel:
        return triton.compile(self.source, target=target, options=self.options)

    def fingerprint(self, target: GPUTarget) -> str:
        """Of all that decides the machine code, and of how it is read (`record`)."""
        backend: Any = make_backend(target)  # its methods are those of a compiler per platform
        context = ir.context()
        options = backend.parse_options(dict(self.options))
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        module = self.source.make_ir(target, options, functions, modules, context)
        parts = (module.str_nodebug(), options.hash(), target, triton.__version__, READER)
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def argument_type(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), f"no kernel takes a {type(value).__name__}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def is_aligned(value: object) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def variant_of(kernel, arguments: tuple, named: dict, kind: str) -> tuple[tuple, Variant]:
    """The variant of `kernel[grid](*arguments, **named)`, and what tells it from others."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: value for name, value in named.items() if name in kernel.arg_names}
    options = {name: value for name, value in named.items() if name not in kernel.arg_names}
    constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
    specialised = {p.name: not (p.is_constexpr or p.do_not_specialize) for p in kernel.params}
    ones = {
        name: 1 for name, v in values.items() if specialised[name] and type(v) is int and v == 1
    }
    fixed = constants | ones
    signature = {
        name: "constexpr" if name in fixed else argument_type(values[name])
        for name in kernel.arg_names
    }
    aligned = {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if p.name not in fixed and specialised[p.name] and is_aligned(values[p.name])
    }
    positions = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    key = (kernel.__name__, *map(str, (signature, fixed, sorted(aligned), options)))
    source = ASTSource(kernel, signature, positions, aligned)
    return key, Variant(kernel.__name__, kind, source, options, constants)


@contextmanager
def recorded(found: dict[tuple, Variant], kind: str, rows: int, target: Target) -> Iterator[None]:
    """Launches inside, as for a GPU of `target`, add their variants to `found`."""

    def launcher(kernel, grid):
        def launch(*arguments, **named):
            key, variant = variant_of(kernel, arguments, named, kind)
            sizes = found.setdefault(key, variant).rows
            if rows not in sizes:
                sizes.append(rows)

        return launch

    with ExitStack() as stack:
        stack.enter_context(patch.object(triton.JITFunction, "__getitem__", launcher))
        for path in KERNELS.glob("*.py"):
            module = import_module(f"aerie.kernels.{path.stem}")
            if path.stem != "backend" and hasattr(module, "check_launchable"):
                stack.enter_context(patch.object(module, "check_launchable", lambda x: None))
            if hasattr(module, "target_of"):
                stack.enter_context(patch.object(module, "target_of", lambda x: target))
        yield


def variants(
    calls: dict[str, Callable],
    kinds: Sequence[str],
    sizes: Sequence[int],
    between: Sequence[int],
    target: Target,
    only: str = "",
) -> list[Variant]:
    """Every distinct variant that the calls of all ops launch, by kind and size class.

    Fails where one of the numbers of rows `between` those classes launches something else.
    """
    found: dict[tuple, Variant] = {}
    for name, kind in product(calls, kinds):
        if only not in name:
            continue
        for rows in sizes:
            with recorded(found, kind, rows, target):
                calls[name](rows, kind)
        others: dict[tuple, Variant] = {}
        for rows in between:
            with recorded(others, kind, rows, target):
                calls[name](rows, kind)
        new = [f"{v.kernel} {kind} {v.rows}" for key, v in others.items() if key not in found]
        assert not new, f"no class of tests/aot/calls.py has {new}: add one to SIZES"
    return list(found.values())
