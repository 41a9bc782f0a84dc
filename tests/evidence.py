"""What every kernel test proves with: truth, guards, bits, layouts and the compiler's view.

    err(kernel) <= 2 * err(eager) + 2 ulp(max |truth|)         err = largest difference to the truth

The truth is the op's own reference in float64 (`exact`), the eager run is the same reference in the
kernel's dtype: a kernel may be as wrong as PyTorch and a little more, whatever the dtype. Indices
and moved data take no tolerance at all (`same_bits`).
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from unittest.mock import patch

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental import _config as fx_config

FACTOR, FLOOR_ULPS = 2, 2
GUARD_BYTES = 256  # keeps the alignment that a launch specialises on
GUARD_FLOAT, GUARD_INTEGER = (
    0xFF,
    0x7B,
)  # NaN in every float type; no NaN a kernel makes is all ones
VAST = 2**31  # elements: the first offset that 32 bits with a sign do not hold
LAYOUTS = ("contiguous", "offset", "columns", "row steps")

# one example database entry would differ between machines: the same few examples everywhere
few_examples = hypothesis.settings(
    derandomize=True, max_examples=12, deadline=None, database=None, print_blob=False
)


def tensors(result: object) -> list[Tensor]:
    """Every tensor of what an op takes or gives: a tensor, a sequence or a dataclass of them."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [x for item in result for x in tensors(item)]
    if is_dataclass(result):
        return [x for f in fields(result) for x in tensors(getattr(result, f.name))]
    return []


def mapped(value, change: Callable[[Tensor], Tensor]):
    """`value` with `change` applied to each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return [mapped(item, change) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if f.init]
        return replace(value, **{name: mapped(getattr(value, name), change) for name in names})
    return value


def exact(ref: Callable, *arguments):
    """The truth: `ref` on the arguments in float64 (FP8 codes stay codes, integers integers)."""
    result = ref(*mapped(list(arguments), _in_double))
    for x in tensors(result):
        assert not x.is_floating_point() or x.dtype == torch.float64, (
            f"{ref.__name__} gave {x.dtype} for float64: it narrows on the way (use `widened`)"
        )
    return result


def _in_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() and x.itemsize > 1 else x


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance from |value| to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    exponent = torch.tensor(max(abs(value), info.smallest_normal)).double().log2().floor()
    return info.eps * 2.0 ** exponent.item()


def assert_as_accurate(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The rule above, for a kernel's output, the float64 truth and the eager run in its dtype.

    Where the truth, rounded to the dtype, or the eager run is NaN or infinite, the kernel must be
    what one of the two is; everywhere else it must be finite.
    """
    assert exact.dtype == torch.float64, f"exact: must be float64, got {exact.dtype}"
    assert actual.shape == exact.shape == eager.shape, (
        f"shapes: actual {tuple(actual.shape)}, exact {tuple(exact.shape)}, {tuple(eager.shape)}"
    )
    assert actual.dtype == eager.dtype, f"actual {actual.dtype}, eager {eager.dtype}"
    if actual.numel() == 0:
        return
    rounded = exact.to(actual.dtype)
    finite = rounded.isfinite() & eager.isfinite()
    _assert_same_special(actual, rounded, eager, ~finite)
    if not finite.any():
        return
    difference, eager_difference = (
        (x.double() - exact).abs().masked_fill(~finite, 0.0) for x in (actual, eager)
    )
    difference = difference.nan_to_num(torch.inf)
    largest = exact.abs().masked_fill(~finite, 0.0).max().item()
    allowed = FACTOR * eager_difference.max().item() + FLOOR_ULPS * ulp(largest, actual.dtype)
    where = _worst(difference)
    assert difference.max().item() <= allowed, (
        f"kernel error {difference.max():.3e}, eager error {eager_difference.max():.3e}, "
        f"allowed {allowed:.3e}; worst at {where}: kernel {actual[where].item()!r}, "
        f"eager {eager[where].item()!r}, exact {exact[where].item()!r}"
    )


def _assert_same_special(actual: Tensor, rounded: Tensor, eager: Tensor, special: Tensor) -> None:
    as_truth, as_eager = (
        (actual == x) | (actual.isnan() & x.isnan()) | (actual.isfinite() & x.isfinite())
        for x in (rounded, eager)
    )
    wrong = special & ~as_truth & ~as_eager
    where = _worst(wrong.double())
    assert not wrong.any(), (
        f"NaN or infinity misplaced in {int(wrong.sum())} elements, as at {where}: "
        f"kernel {actual[where].item()}, eager {eager[where].item()}, exact {rounded[where].item()}"
    )


def _worst(difference: Tensor) -> tuple[int, ...]:
    flat = difference.argmax().cpu()
    return tuple(int(i) for i in torch.unravel_index(flat, difference.shape))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bytes: NaN equals itself here, and -0.0 is not 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    flat = torch.empty(x.numel(), dtype=x.dtype, device=x.device)  # `view` wants a stride of 1
    return flat.copy_(x.flatten()).view(torch.uint8)


def guarded(shape: Sequence[int], dtype: torch.dtype, device) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous tensor inside a larger buffer, and the check that nothing around it changed.

    The tensor starts as NaN (integers: a large number), and so do the guards on both sides of it.
    """
    pattern = GUARD_FLOAT if dtype.is_floating_point else GUARD_INTEGER
    size = torch.Size(shape).numel() * dtype.itemsize
    padded = -(-size // 16) * 16
    buffer = torch.full((2 * GUARD_BYTES + padded,), pattern, dtype=torch.uint8, device=device)
    end = GUARD_BYTES + size

    def check() -> None:
        for side, guard in (("before", buffer[:GUARD_BYTES]), ("behind", buffer[end:])):
            changed = (guard != pattern).sum().item()
            assert changed == 0, f"{changed} bytes written {side} a {dtype} {tuple(shape)}"

    return buffer[GUARD_BYTES:end].view(dtype).view(shape), check


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Ops that allocate inside get guarded outputs and workspaces; checked on the way out."""
    checks = []

    def allocate(like: Tensor, size, extra: tuple, named: dict) -> Tensor:
        shape = (size, *extra) if isinstance(size, int) else tuple(size)
        dtype, device = named.get("dtype") or like.dtype, named.get("device") or like.device
        x, check = guarded(shape, dtype, device)
        checks.append(check)
        return x

    def new_empty(like, size, *extra, **named):
        return allocate(like, size, extra, named)

    def new_zeros(like, size, *extra, **named):
        return allocate(like, size, extra, named).zero_()

    def new_full(like, size, fill_value, **named):
        return allocate(like, size, (), named).fill_(fill_value)

    with patch.multiple(Tensor, new_empty=new_empty, new_zeros=new_zeros, new_full=new_full):
        yield
    for check in checks:
        check()


def run_guarded(op: Callable, *arguments, runs: int = 2):
    """`op(*arguments)` twice, bit by bit the same, writing nowhere but into its outputs.

    The arguments must come back unchanged, so this is not for ops that write into them.
    """
    before = [x.clone() for x in tensors(list(arguments))]
    with guarded_allocations():
        first, *others = [op(*arguments) for _ in range(runs)]
    for second in others:
        for x, y in zip(tensors(first), tensors(second), strict=True):
            assert same_bits(x, y), f"two runs differ in {int((x != y).sum())} elements"
    for x, y in zip(before, tensors(list(arguments)), strict=True):
        assert same_bits(x, y), "the op changed one of its arguments"
    return first


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in another of `LAYOUTS`; what lies between them is NaN (or a large number).

    The last dimension stays contiguous. `columns` is a slice of a wider tensor, as a fused
    projection gives; `row steps` takes every second row; `offset` starts at an odd element.
    """
    if layout == "contiguous":
        return x.contiguous()
    sizes, last = list(x.shape), x.dim() - 1
    if layout == "offset":
        flat = _poisoned([x.numel() + 1], x)
        view = flat[1:].view(sizes)
    elif layout == "columns":
        sizes[last] += 24
        view = _poisoned(sizes, x).narrow(last, 8, x.shape[last])
    elif layout == "row steps":
        sizes[0] *= 2
        view = _poisoned(sizes, x)[::2]
    else:
        raise ValueError(f"layout: must be one of {LAYOUTS}, got {layout!r}")
    view.copy_(x)
    return view


def _poisoned(sizes: Sequence[int], like: Tensor) -> Tensor:
    pattern = GUARD_FLOAT if like.is_floating_point() else GUARD_INTEGER
    count = torch.Size(sizes).numel() * like.itemsize
    return (
        torch.full((count,), pattern, dtype=torch.uint8, device=like.device)
        .view(like.dtype)
        .view(list(sizes))
    )


def vast(elements: int, dtype: torch.dtype, device) -> Tensor:
    """Zeros from index 0 to `VAST + elements`, with as many before index 0 that a test may hit.

    On the CPU nothing is resident before it is touched, so this costs address space only. An index
    that wraps around at 32 bits reads a zero in front instead of crashing.
    """
    count = 2 * VAST + elements
    if torch.device(device).type == "cuda":
        return torch.zeros(count, dtype=dtype, device=device)[VAST:]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags), dtype=dtype)[VAST:]


def takes_row_scales(device) -> bool:
    """Whether this torch multiplies FP8 codes with a scale per row: on a CPU 2.11 does not."""
    codes = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn)
    ones = torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), ones, ones.t(), out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:
        return False
    return True


def on_gpu(*cases) -> list:
    """The cases as parameters that only a GPU is given: sizes of real models."""
    return [pytest.param(case, marks=pytest.mark.gpu, id=f"real-{case}") for case in cases]


def edges(block: int, most: int | None = None) -> st.SearchStrategy[int]:
    """Sizes around a block edge first, then any up to `most`; for hypothesis."""
    most = 2 * block + 3 if most is None else most
    near = sorted({n for n in (1, 2, block - 1, block, block + 1, most) if 1 <= n <= most})
    return st.sampled_from(near) | st.integers(1, most)


def layouts() -> st.SearchStrategy[str]:
    return st.sampled_from(LAYOUTS)


def normal(shape: Sequence[int], dtype: torch.dtype, device, seed: int = 0) -> Tensor:
    """Standard normal values that depend on nothing but the shape and the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator).to(dtype).to(device)


def check_compiles(op: Callable, *arguments, again: tuple | None = None) -> None:
    """`torch.compile(op, fullgraph=True)` traces, gives the same bits, and compiles only once.

    `again` are arguments of another row count (at least 2, as PyTorch treats 0 and 1 apart): they
    must run in what the first call compiled.
    """
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="eager", dynamic=again is not None)
    for number, call in enumerate([arguments] if again is None else [arguments, again]):
        call = mapped(list(call), torch.clone)  # a view would bring guards on its base along
        with (
            torch._dynamo.config.patch(error_on_recompile=number > 0),
            # equal sizes of unlike things are chance here, and must not be compiled in
            fx_config.patch(use_duck_shape=False),  # pyright: ignore[reportAttributeAccessIssue]
        ):
            results = compiled(*call), op(*call)
        for x, y in zip(*map(tensors, results), strict=True):
            assert same_bits(x, y), "the compiled op gives other bits"


def check_rows_apart(op: Callable, x: Tensor, row: int) -> None:
    """NaN, +inf and -inf in one row of `x` change no other row of any output of `op(x)`.

    Every output has the rows of `x` in front.
    """
    others = [r for r in range(x.shape[0]) if r != row]
    clean = [y.clone() for y in tensors(op(x))]
    for poison in (torch.nan, torch.inf, -torch.inf):
        dirty = x.clone(memory_format=torch.contiguous_format)
        dirty.view(len(dirty), -1)[row, dirty[row].numel() // 2] = poison
        for before, after in zip(clean, tensors(op(dirty)), strict=True):
            assert same_bits(before[others], after[others]), f"{poison} left row {row}"
