"""Room for weights: layouts are kept, and large ones lie on pages that the system may make huge."""

from pathlib import Path

import pytest
import torch

from aerie.llama4.weight_memory import MIN_BYTES, empty_like

LAYOUTS = {
    "contiguous": lambda: torch.empty(3, 700, 1300),
    "one input-major": lambda: torch.empty(1300, 2000).t(),
    "many input-major": lambda: torch.empty(3, 700, 1300).mT,
    "small": lambda: torch.empty(5, 7).t(),
    "empty": lambda: torch.empty(0, 7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_kept(layout, dtype):
    with torch.device("meta"):
        wanted = LAYOUTS[layout]()
    room = empty_like(wanted, dtype, "cpu")
    assert (room.shape, room.stride(), room.dtype) == (wanted.shape, wanted.stride(), dtype)
    values = torch.randn(wanted.shape).to(dtype)
    assert torch.equal(room.copy_(values).float(), values.float())


def flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that an address lies in."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            is_inside = start <= address < end
        elif is_inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
def test_large_weights_ask_for_huge_pages():
    large = empty_like(torch.empty(MIN_BYTES, device="meta"), torch.uint8, "cpu")
    small = empty_like(torch.empty(MIN_BYTES - 1, device="meta"), torch.uint8, "cpu")
    assert "hg" in flags(large.data_ptr())
    assert "hg" not in flags(small.data_ptr())


def test_memory_goes_with_its_tensor():
    """A mapping that outlived its tensor would fill the address space of this many."""
    shape = torch.empty(2**33, device="meta")
    for _ in range(2**15):  # 2 ** 48 bytes in all, twice what a process may map
        empty_like(shape, torch.uint8, "cpu")
