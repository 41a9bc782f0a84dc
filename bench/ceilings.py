"""What this device reaches, measured in the session that uses it, and the floors that follow.

    floor = max(bytes / copy bandwidth, flops / matmul rate)

Copy bandwidth counts bytes read and bytes written of a large copy. The read ceiling is a plain
reduction, which writes nothing: a kernel that only streams weights may pass the copy's floor.
Products use random data; zeros draw less power and run faster than real data will.

    python -m bench.ceilings
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter

import torch
import triton
import triton.language as tl

from bench.graphs import captured, elapsed_us
from bench.timer import Work

REPEATS, CHAIN = 7, 64
SUM_BLOCK = tl.constexpr(2048)  # elements a program loads at a time
BYTES = {"cpu": 2**27, "cuda": 2**31}
SIDE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates; a missing one is None."""

    copy_gb_s: float
    read_gb_s: float
    matmul_tflop_s: float
    fp8_tflop_s: float | None
    launch_us: float  # one more kernel in a graph; on a CPU one more call of torch

    def floor_us(self, work: Work) -> float:
        """No call that does `work` can be faster on this device."""
        rate = self.fp8_tflop_s if work.fp8_products else self.matmul_tflop_s
        compute = work.flops / (rate or self.matmul_tflop_s) / 1e6
        return max(work.bytes / self.copy_gb_s / 1e3, compute)

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


@triton.jit
def _sum_kernel(x_ptr, partial_ptr, N):
    """Program p sums every P-th block of `x` ([N]) into element p of `partial` ([P])."""
    total = tl.zeros([SUM_BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * SUM_BLOCK + tl.arange(0, SUM_BLOCK)
    for start in range(0, N, tl.num_programs(0) * SUM_BLOCK):
        n = first + start
        total += tl.load(x_ptr + n, mask=n < N, other=0.0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total))


def read_sum(x_N: torch.Tensor, programs: int) -> torch.Tensor:
    """Partial sums of float32 `x_N`; reads all of it and writes next to nothing."""
    partial = x_N.new_empty(programs)
    _sum_kernel[(programs,)](x_N, partial, x_N.numel())
    return partial


def measure_ceilings(device: torch.device) -> Ceilings:
    """About a second of large copies, reads and products on `device`."""
    source = torch.randn(BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    on_gpu = device.type == "cuda"
    read = (lambda: read_sum(source, 16 * _processors(device))) if on_gpu else source.sum
    n, dtype = SIDE[device.type], torch.bfloat16 if on_gpu else torch.float32
    left, right = torch.randn(2, n, n, device=device, dtype=dtype)
    bytes_each = source.numel() * 4
    return Ceilings(
        copy_gb_s=2 * bytes_each / _median_us(lambda: target.copy_(source), device) / 1e3,
        read_gb_s=bytes_each / _median_us(read, device) / 1e3,
        matmul_tflop_s=2 * n**3 / _median_us(lambda: left @ right, device) / 1e6,
        fp8_tflop_s=_fp8_rate(left, right) if on_gpu else None,
        launch_us=_launch_us(device),
    )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fp8_rate(left: torch.Tensor, right: torch.Tensor) -> float | None:
    """None where the device has no FP8 products that torch knows."""
    if torch.version.hip or torch.cuda.get_device_capability(left.device) < (8, 9):
        return None
    a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=left.device)
    scaled_mm = torch.ops.aten._scaled_mm
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    multiply = partial(scaled_mm, a, b, one, one, **options)
    return 2 * left.shape[0] ** 3 / _median_us(multiply, left.device) / 1e6


def _launch_us(device: torch.device) -> float:
    x = torch.zeros(16, device=device)

    def chain() -> None:
        for _ in range(CHAIN):
            x.add_(1.0)

    chain()
    call = captured(chain) if device.type == "cuda" else chain
    return _median_us(call, device) / CHAIN


def _median_us(call: Callable[[], object], device: torch.device) -> float:
    def host_us() -> float:
        start = perf_counter()
        call()
        return 1e6 * (perf_counter() - start)

    time = (lambda: elapsed_us(call)) if device.type == "cuda" else host_us
    for _ in range(3):
        time()
    return median(time() for _ in range(REPEATS))


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in measure_ceilings(device).as_dict().items():
        print(f"{name:14} {'-' if value is None else f'{value:.4g}'}")


if __name__ == "__main__":
    main()
