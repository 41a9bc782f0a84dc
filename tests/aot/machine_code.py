"""Facts of a compiled kernel, read from the machine code that Triton's own bundled tools show."""

import re
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from struct import unpack_from

import triton
from triton.compiler import CompiledKernel

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA_ARCHITECTURES = {80: "SM80", 90: "SM90a", 100: "SM100a"}  # as the disassembler names them
MATRIX = ("HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "QMMA", "DMMA", "MFMA")


@dataclass(frozen=True)
class Facts:
    """What the rules look at; counts are static instructions."""

    registers: int
    shared: int  # bytes
    spills: int  # instructions on local memory, or bytes of scratch on AMD
    matrix: dict[str, int]  # matrix instructions by unit
    wide_loads: int  # 128 bits, or bulk, from global memory
    loads: int
    narrow_share: float  # of the bytes of all loads; of asynchronous copies, where there are some
    instructions: int
    dot_types: list[str]  # element types of the left operands of `tl.dot`
    narrow_offsets: list[str]  # products of an index and a stride in 32 bits


def facts_of(kernels: Sequence[CompiledKernel]) -> list[Facts]:
    """The facts of kernels that are compiled for one target."""
    if not kernels:
        return []
    if "cubin" in kernels[0].asm:
        arch = NVIDIA_ARCHITECTURES[kernels[0].metadata.target.arch]
        code = map(read_sass, disassembled([kernel.asm["cubin"] for kernel in kernels], arch))
    else:
        code = (read_amdgcn(kernel.asm["amdgcn"]) for kernel in kernels)
    return [_facts(read, kernel) for read, kernel in zip(code, kernels, strict=True)]


def _facts(code: dict, kernel: CompiledKernel) -> Facts:
    ttir = kernel.asm["ttir"]
    return Facts(
        **code,
        shared=kernel.metadata.shared,
        dot_types=sorted(set(re.findall(r"tt\.dot .*?: tensor<\d+x\d+x(\w+)>", ttir))),
        narrow_offsets=narrow_offsets(ttir),
    )


def disassembled(cubins: Sequence[bytes], arch: str) -> list[str]:
    """Resource usage and SASS of every cubin.

    The disassembler takes longer to start than to read a kernel, so the code of all is joined.
    """
    codes = [_text_section(cubin) for cubin in cubins]
    ends = list(accumulate(map(len, codes)))
    sass = _shown("nvdisasm", b"".join(codes), "--binary", arch)
    parts = [_shown("cuobjdump", cubin, "-res-usage").splitlines() for cubin in cubins]
    for line in sass.splitlines():
        if match := re.match(r"\s*/\*([0-9a-f]{4,})\*/", line):
            parts[bisect_right(ends, int(match[1], 16))].append(line)
    return ["\n".join(lines) for lines in parts]


def _shown(tool: str, content: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [NVIDIA_TOOLS / tool, *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _text_section(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin, a 64-bit ELF file."""
    (table,) = unpack_from("<Q", cubin, 0x28)
    size, count, names = unpack_from("<HHH", cubin, 0x3A)
    # of every section: its name, type, flags, address, offset and size
    sections = [unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    name_at = sections[names][4]
    texts = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin[name_at + name :].startswith(b".text.")
    ]
    assert len(texts) == 1, f"{len(texts)} functions in a cubin"
    return texts[0]


def read_sass(text: str) -> dict:
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    usage = re.search(r"REG:(\d+)", text)
    assert usage is not None, "no resource usage is shown"
    assert code, "no instructions are shown"
    loads = [c for c in code if re.match(r"LDG\b|LDGSTS|UTMALDG|UBLKCP", c)]
    copies = [_sass_bytes(c) for c in loads if not c.startswith("LDG.")]
    return {
        "registers": int(usage[1]),
        # not the stack: a called division reserves a frame that nothing touches
        "spills": sum(c.startswith(("LDL", "STL")) for c in code),
        "matrix": _matrix(c.split(".")[0] for c in code),
        "wide_loads": sum(_sass_bytes(c) == 16 for c in loads),
        "loads": len(loads),
        "narrow_share": _narrow_share(copies or [_sass_bytes(c) for c in loads]),
        "instructions": len(code),
    }


def _sass_bytes(load: str) -> int:
    if re.search(r"\.128|UTMALDG|UBLKCP", load):
        return 16
    sizes = {".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
    return next((size for mark, size in sizes.items() if mark in load), 4)


def _amdgcn_bytes(load: str) -> int:
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "short": 2, "byte": 1}
    return next((size for mark, size in sizes.items() if mark in load), 4)


def _narrow_share(sizes: list[int]) -> float:
    return sum(size for size in sizes if size < 16) / max(1, sum(sizes))


def read_amdgcn(text: str) -> dict:
    code = re.findall(r"^\t([a-z][a-z0-9_]+)\b", text, re.MULTILINE)
    numbers = {
        name: int(re.findall(rf"\.{name}:?\s+(\d+)", text)[-1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    loads = [c for c in code if re.match(r"(global|buffer)_load", c)]
    return {
        "registers": numbers["vgpr_count"],
        "spills": numbers["private_segment_fixed_size"] or numbers["vgpr_spill_count"],
        "matrix": _matrix("MFMA" for c in code if c.startswith("v_mfma")),
        "wide_loads": sum(_amdgcn_bytes(c) == 16 for c in loads),
        "loads": len(loads),
        "narrow_share": _narrow_share([_amdgcn_bytes(c) for c in loads]),
        "instructions": len(code),
    }


def _matrix(names) -> dict[str, int]:
    counts = Counter(name for name in names if name in MATRIX)
    return {name: counts[name] for name in MATRIX if counts[name]}


def narrow_offsets(ttir: str) -> list[str]:
    """Products in 32 bits, of an index (or a loaded value) and a size, that reach an address.

    A position in an array is the product of an index and a stride, which 32 bits need not hold. An
    index itself (a program's block plus a lane, a loop counter) and a product of sizes alone fit.
    """
    values = _values(ttir)
    kinds: dict[str, str] = {}
    offsets = {v.operands[1] for v in values.values() if v.operation == "tt.addptr"}
    reached, queue = set(), [name for name in offsets if name in values]
    while queue:
        name = queue.pop()
        if name in reached or "!tt.ptr" in values[name].type:
            continue
        reached.add(name)
        if values[name].operation == "arith.muli" and values[name].type.endswith("i64"):
            continue  # its factors are an index and a stride
        queue += [operand for operand in values[name].operands if operand in values]
    return sorted(
        values[name].text
        for name in reached
        if values[name].operation == "arith.muli"
        and values[name].type.endswith("i32")
        and _is_position(values[name], values, kinds)
    )


@dataclass(frozen=True)
class _Value:
    operation: str
    operands: tuple[str, ...]
    type: str
    text: str


def _values(ttir: str) -> dict[str, _Value]:
    """Every value of the module by name; loop variables get what flows into them as operands."""
    values = {}
    for line in ttir.splitlines():
        text = re.sub(r"\s*loc\(.*$", "", line).strip()
        for name, start in re.findall(r"(%[\w#]+) = (%[\w#]+)", text):
            values[name] = _Value("loop", (start,), "", text)
        if (match := re.match(r"(%\w+)(?::\d+)? = ([\w.]+)\s*(.*)$", text)) is None:
            continue
        name, operation, rest = match.groups()
        operands = tuple(re.findall(r"%[\w#]+", rest))
        kind = rest.rsplit(" to ", 1)[-1].rsplit("-> ", 1)[-1].rsplit(" : ", 1)[-1].strip(" >")
        values[name] = _Value(operation, operands, kind, text)
    return values


def _is_position(value: _Value, values: dict[str, _Value], kinds: dict[str, str]) -> bool:
    factors = {_kind(operand, values, kinds) for operand in value.operands}
    if factors & {"constant", "share"}:
        return "loaded" in factors  # as a page number times the page size
    return factors != {"size"}


def _kind(name: str, values: dict[str, _Value], kinds: dict[str, str]) -> str:
    """constant, size (an argument), share (a size cut into parts), index (varies) or loaded."""
    if name not in values:
        return "size"  # an argument of the kernel
    if name not in kinds:
        kinds[name] = "constant"  # for loops that come back to themselves
        value = values[name]
        chosen = value.operands[value.operation == "arith.select" :]  # not its condition
        below = [_kind(operand, values, kinds) for operand in chosen]
        if value.operation in ("tt.load", "tt.atomic_rmw"):
            kinds[name] = "loaded"
        elif value.operation == "tt.make_range" and "end = 2 :" in value.text:
            kinds[name] = "constant"  # one of two halves
        elif value.operation in ("tt.get_program_id", "tt.make_range", "scf.for", "loop"):
            kinds[name] = "index"
        elif value.operation == "arith.divsi" and below == ["size", "constant"]:
            kinds[name] = "share"  # counted in parts: the number of a part times it is an index
        else:
            order = ("loaded", "index", "size", "share", "constant")
            kinds[name] = next((kind for kind in order if kind in below), "constant")
    return kinds[name]
