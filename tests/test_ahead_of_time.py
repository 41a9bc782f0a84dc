"""Every variant of every kernel compiles for GPUs that are not here, and its machine code is sound.

The interpreter knows neither types that do not lower, nor layouts, nor memory limits, nor which
instructions a launch rule ends in. `tests/aot/` compiles and reads; the rules and the exceptions
that today's kernels need are in `tests/aot/rules.py`. What was compiled before and is unchanged is
read from `bench/results/aot.json`, but for a sample of the day (`tests/aot/record.py`);
`python -m tests.aot --check` compiles everything.
"""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import triton

from tests.aot import record
from tests.aot.calls import CALLS
from tests.aot.machine_code import Facts, narrow_offsets, read_amdgcn, read_sass
from tests.aot.proof import Row, proven, ran
from tests.aot.record import DAYS, Record, differences, is_due
from tests.aot.rules import COMPILER_RULES, EXCEPTED, RULES, TARGETS, broken_rules
from tests.aot.table import TABLE, labels, recorded_version, rendered

KERNELS = Path(__file__).parents[1] / "kernels"
STEMS = sorted(p.stem for p in KERNELS.glob("*.py") if "@torch.library" in p.read_text())
PROOF = 1200  # seconds that a loaded machine may take for all compilations
STALE = "stale: run `python -m tests.aot --update`"
OTHER_VERSION = (
    f"the record is not of Triton {triton.__version__}: a sample was compiled and held against the "
    "rules that no compiler changes; `python -m tests.aot --check` compiles everything"
)


@pytest.fixture(scope="module")
def rows():
    return proven("due")


@pytest.mark.parametrize("stem", STEMS)
def test_every_op_has_representative_calls(stem):
    assert stem in CALLS, f"add `def {stem}(rows, kind)` to tests/aot/calls.py"


@pytest.mark.timeout(PROOF)
def test_every_kernel_is_compiled(rows):
    names = {row.kernel for row in rows}
    sources = "\n".join(path.read_text() for path in KERNELS.glob("*.py"))
    launched = {
        line.split("def ")[1].split("(")[0]
        for line in sources.splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert names == launched
    assert {row.target for row in rows} == set(TARGETS)


@pytest.mark.timeout(PROOF)
def test_only_named_exceptions_break_a_rule(rows):
    """All rules under the record's version; under another, those that hold for any compiler."""
    rules = set(RULES) if Record.read().is_current else set(RULES) - COMPILER_RULES
    unnamed = [
        (row.kernel, rule, row.target, row.kind, row.rows, row.facts)
        for row in rows
        for rule in rules.intersection(row.unnamed)
    ]
    assert unnamed == []


@pytest.mark.timeout(PROOF)
@pytest.mark.parametrize("exception", EXCEPTED, ids=lambda e: f"{e.kernel}-{e.rule}-{e.target}")
def test_every_exception_is_still_needed(exception, rows):
    assert exception.rule in RULES
    if not Record.read().is_current:
        pytest.skip(OTHER_VERSION)
    broken = [
        row
        for row in rows
        for rule in row.broken
        if exception.covers(row.kernel, rule, row.target, row.kind)
    ]
    assert broken, f"nothing needs {exception} any more: remove it"


@pytest.mark.timeout(PROOF)
def test_the_record_is_current_and_what_a_compilation_gives(rows):
    if not Record.read().is_current:
        pytest.skip(OTHER_VERSION)
    assert differences(rows) == [], STALE


@pytest.mark.timeout(PROOF)
def test_the_table_is_current(rows):
    recorded, current = TABLE.read_text(), rendered(rows)
    assert labels(recorded) == labels(current), STALE
    if not Record.read().is_current:
        pytest.skip(OTHER_VERSION)
    assert recorded_version(recorded) == triton.__version__
    assert recorded == current, STALE


DIVISIONS = """
from tests.aot.calls import CALLS
from tests.aot.launches import variants
from tests.aot.rules import CHOSEN_FOR, TARGETS

calls = {"row_filter": CALLS["row_filter"]}
for variant in variants(calls, ["bf16"], [1], [], CHOSEN_FOR["sm_90"]):
    for line in variant.compile(TARGETS["sm_90"]).asm["ptx"].splitlines():
        if "div." in line and "f32" in line:
            print(line.split()[0])
"""


@pytest.mark.timeout(PROOF)
def test_a_temperature_is_divided_by_exactly():
    """A draw is the same on every device. `/` compiles to `div.full`, which is off by up to 2 ulp,
    and the interpreter knows nothing of that. The mass is divided by a power of two, which any
    division does exactly."""
    assert "div.rn.f32" in ran("-c", DIVISIONS)


def test_every_variant_is_compiled_once_in_sixteen_days():
    for fingerprint in ("0" * 32, "f" * 32, "0123456789abcdef" * 2):
        assert sum(is_due(fingerprint, day) for day in range(739000, 739000 + DAYS)) == 1


def test_a_false_or_missing_or_needless_record_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RECORD", tmp_path / "aot.json")
    sound = asdict(facts())
    row = Row("_x_kernel", "bf16", [1], "sm_90", "0a", sound, sound)
    Record.of([row]).write()
    assert Record.read() == Record.of([row])
    assert differences([row]) == []
    assert "not recorded" in differences([replace(row, recorded=None)])[0]
    assert "'spills': 1" in differences([replace(row, facts=sound | {"spills": 1})])[0]
    assert differences([]) == ["sm_90 0a: no launch asks for it"]
    content = json.loads(record.RECORD.read_text()) | {"triton": "0"}
    record.RECORD.write_text(json.dumps(content))
    assert not Record.read().is_current


def facts(**changed):
    sound = {
        "registers": 64,
        "shared": 0,
        "spills": 0,
        "matrix": {},
        "wide_loads": 1,
        "loads": 1,
        "narrow_share": 0.0,
        "instructions": 100,
        "dot_types": [],
        "narrow_offsets": [],
    }
    return Facts(**(sound | changed))


@pytest.mark.parametrize(
    ("kernel", "target", "changed", "broken"),
    [
        ("_x_kernel", "sm_90", {}, []),
        ("_x_kernel", "sm_90", {"spills": 2}, ["spills"]),
        ("_x_kernel", "gfx942", {"shared": 64 * 1024 + 1}, ["shared"]),
        ("_x_kernel", "sm_90", {"shared": 64 * 1024 + 1}, []),
        ("_x_kernel", "sm_90", {"dot_types": ["bf16"], "matrix": {"HGMMA": 4}}, []),
        ("_x_kernel", "sm_90", {"dot_types": ["bf16"], "matrix": {"HMMA": 4}}, ["units"]),
        (
            "_x_kernel",
            "sm_90",
            {"dot_types": ["bf16"], "matrix": {"HGMMA": 4, "HMMA": 1}},
            ["units"],
        ),
        ("_x_kernel", "sm_90", {"dot_types": ["bf16"]}, ["units"]),
        ("_x_kernel", "sm_90", {"dot_types": ["f8E4M3FN"], "matrix": {"QGMMA": 4}}, []),
        ("_x_kernel", "sm_90", {"dot_types": ["f8E4M3FN"], "matrix": {"HGMMA": 4}}, ["units"]),
        ("_x_kernel", "sm_90", {"matrix": {"HGMMA": 4}}, ["units"]),
        ("_x_kernel", "sm_90", {"dot_types": ["f32"]}, []),
        ("_x_kernel", "sm_100", {"dot_types": ["f16"], "matrix": {"UTCHMMA": 1}}, []),
        ("_x_kernel", "sm_90", {"narrow_share": 0.3}, []),
        ("_linear_kernel", "sm_90", {"narrow_share": 0.3}, ["wide loads"]),
        ("_x_kernel", "sm_90", {"narrow_offsets": ["%1 = ..."]}, ["offsets"]),
    ],
)
def test_rules_notice(kernel, target, changed, broken):
    assert broken_rules(kernel, target, facts(**changed)) == broken


SASS = """
 Function _x_kernel:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:576
        /*0000*/                   LDC R1, c[0x0][0x37c] ;   /* 0x0000df00ff017b82 */
                                                             /* 0x000e220000000800 */
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/               @P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64], P5 ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*12f60*/                  EXIT ;
"""


def test_sass_is_read():
    assert read_sass(SASS) == {
        "registers": 40,
        "spills": 0,
        "matrix": {"HGMMA": 1},
        "wide_loads": 2,
        "loads": 3,
        "narrow_share": 0.0,
        "instructions": 7,
    }
    narrow = SASS.replace("LDGSTS.E.BYPASS.128", "LDGSTS.E.64")
    assert read_sass(narrow)["narrow_share"] == 1.0  # of the copies
    plain = SASS.replace("LDGSTS.E.BYPASS.128", "LDG.E.64")
    assert read_sass(plain)["narrow_share"] == pytest.approx((8 + 2) / (16 + 8 + 2))
    assert read_sass(SASS.replace("STACK:0", "STACK:8"))["spills"] == 0
    assert read_sass(SASS.replace("LDGDEPBAR", "STL.64 [R1], R4"))["spills"] == 1
    with pytest.raises(AssertionError, match="no instructions"):
        read_sass("REG:40 STACK:0")


AMDGCN = """
_x_kernel:
\tglobal_load_dwordx4 v[4:7], v[4:5], off
\tglobal_load_ushort v8, v[4:5], off
\tv_mfma_f32_16x16x16_bf16 v[2:5], v[50:51], v[46:47], v[2:5]
\ts_endpgm
\t\t.amdhsa_private_segment_fixed_size 0
    .private_segment_fixed_size: 0
    .vgpr_count:     56
    .vgpr_spill_count: 0
"""


def test_amdgcn_is_read():
    assert read_amdgcn(AMDGCN) == {
        "registers": 56,
        "spills": 0,
        "matrix": {"MFMA": 1},
        "wide_loads": 1,
        "loads": 2,
        "narrow_share": 2 / 18,
        "instructions": 4,
    }
    assert read_amdgcn(AMDGCN.replace("_size: 0", "_size: 16"))["spills"] == 16
    assert read_amdgcn(AMDGCN.replace("spill_count: 0", "spill_count: 3"))["spills"] == 3


TTIR = """
  tt.func public @k(%x_ptr: !tt.ptr<f32>, %stride: i32, %D: i32) {
    %c64_i32 = arith.constant 64 : i32
    %pid = tt.get_program_id x : i32
    %block = arith.muli %pid, %c64_i32 : i32
    %lane = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
    %start = tt.splat %block : i32 -> tensor<64xi32>
    %row = arith.addi %start, %lane : tensor<64xi32>
    %steps = tt.splat %stride : i32 -> tensor<64xi32>
    %OFFSET
    %ptrs = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>>
    %at = tt.addptr %ptrs, %offset : tensor<64x!tt.ptr<f32>>, tensor<64xTYPE>
    %value = tt.load %at : tensor<64x!tt.ptr<f32>>
"""
OFFSETS = {  # lines that compute %offset, its type, and how many products must be named
    "narrow": ("%offset = arith.muli %row, %steps : tensor<64xi32>", "i32", 1),
    "widened after the product": (
        "%p = arith.muli %row, %steps : tensor<64xi32>\n"
        "%offset = arith.extsi %p : tensor<64xi32> to tensor<64xi64>",
        "i64",
        1,
    ),
    "wide": (
        "%r = arith.extsi %row : tensor<64xi32> to tensor<64xi64>\n"
        "%s = arith.extsi %steps : tensor<64xi32> to tensor<64xi64>\n"
        "%offset = arith.muli %r, %s : tensor<64xi64>",
        "i64",
        0,
    ),
    "a row number of two parts": (
        "%p = arith.muli %row, %steps : tensor<64xi32>\n"
        "%r = arith.extsi %p : tensor<64xi32> to tensor<64xi64>\n"
        "%s = arith.extsi %steps : tensor<64xi32> to tensor<64xi64>\n"
        "%offset = arith.muli %r, %s : tensor<64xi64>",
        "i64",
        0,
    ),
    "a block plus a lane": ("%offset = arith.addi %row, %lane : tensor<64xi32>", "i32", 0),
    "sizes alone": (
        "%p = arith.muli %stride, %D : i32\n%offset = tt.splat %p : i32 -> tensor<64xi32>",
        "i32",
        0,
    ),
    "a loaded number times a constant": (
        "%q = tt.splat %x_ptr : !tt.ptr<i32> -> tensor<64x!tt.ptr<i32>>\n"
        "%page = tt.load %q : tensor<64x!tt.ptr<i32>>\n"
        "%c = arith.constant dense<16> : tensor<64xi32>\n"
        "%offset = arith.muli %page, %c : tensor<64xi32>",
        "i32",
        1,
    ),
    "a loop's counter": (
        "%z = scf.for %i = %c64_i32 to %D step %c64_i32 iter_args(%a = %lane) -> (i32) : i32 {\n"
        "%p = arith.muli %i, %stride : i32\n%offset = tt.splat %p : i32 -> tensor<64xi32>",
        "i32",
        1,
    ),
}


@pytest.mark.parametrize(("lines", "type_", "count"), OFFSETS.values(), ids=OFFSETS)
def test_narrow_offsets_are_found(lines, type_, count):
    found = narrow_offsets(TTIR.replace("%OFFSET", lines).replace("TYPE", type_))
    assert Counter("muli" in line for line in found) == Counter({True: count} if count else {})
