"""What every compiled variant must be, and the named exceptions that today's kernels still need."""

from dataclasses import dataclass
from fnmatch import fnmatch

from triton.backends.compiler import GPUTarget

from aerie.kernels.target import AMPERE, BLACKWELL, HOPPER, MI300
from tests.aot.calls import STREAMED
from tests.aot.machine_code import Facts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CHOSEN_FOR = {"sm_80": AMPERE, "sm_90": HOPPER, "sm_100": BLACKWELL, "gfx942": MI300}
SHARED_BYTES = {  # per program, what a launch may ask for
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
UNITS = {  # where the products of `tl.dot` must run, by the type of their operands
    "sm_80": {"half": {"HMMA"}, "fp8": {"HMMA"}},
    "sm_90": {"half": {"HGMMA"}, "fp8": {"QGMMA"}},
    "sm_100": {"half": {"UTCHMMA"}, "fp8": {"UTCQMMA"}},
    "gfx942": {"half": {"MFMA"}, "fp8": {"MFMA"}},
}
OPERANDS = {"bf16": "half", "f16": "half", "f8E4M3FN": "fp8", "f8E5M2": "fp8"}
MOST_NARROW = 0.25  # of the bytes read: page numbers, positions, scales and the like
RULES = {
    "spills": "no spilled register, no local memory",
    "shared": "shared memory under the limit of the target",
    "units": "every half and FP8 product on the tensor-core unit of the target, none beside it",
    "wide loads": "a streamed weight or cache is read 128 bits at a time, or in bulk",
    "offsets": "an index times a stride is a product of 64 bits",
}
COMPILER_RULES = {"spills", "units", "wide loads"}  # what another version of Triton may change


@dataclass(frozen=True)
class Excepted:
    """A rule that a kernel breaks today; patterns as in `fnmatch`."""

    kernel: str
    rule: str
    target: str
    kind: str
    reason: str

    def covers(self, kernel: str, rule: str, target: str, kind: str) -> bool:
        wanted = (self.kernel, self.rule, self.target, self.kind)
        return all(map(fnmatch, (kernel, rule, target, kind), wanted))


AMD_GATHER = "rows found by an id or a page are read 8 bytes at a time on AMD, the weight 16"
AMD_FLOAT32 = "float32 is no served dtype: AMD's lanes read 8 bytes each of a step 32 columns deep"
FLOAT32 = "float32 is no served dtype: rows normed on their way, multiplied without tensor cores"
FEW_LOADS = "all keys and values are 128 bits wide; beside these few the positions and words count"
AMD_ROWS = "64 rows of codes are read 8 bytes at a time on AMD, the weight 16"
PROMPT = "prompts of 256 rows or more: two instructions on local memory, their cause not traced"
SPREAD = "a row cut over GPUs in float32: two instructions on local memory, their cause not traced"
AMD_FP8 = "e4m3 is emulated there; beside the pairs of a prompt 256 registers are too few"
EXCEPTED = (
    Excepted("_argmax_kernel", "spills", "sm_100", "fp32", SPREAD),
    Excepted("_experts_down_kernel", "spills", "gfx942", "fp8", AMD_FP8),
    Excepted("_tree_attention_kernel", "spills", "sm_90", "*16", PROMPT),
    Excepted("_tree_attention_kernel", "spills", "sm_100", "fp8", PROMPT),
    Excepted("_experts_down_kernel", "spills", "sm_100", "fp32", FLOAT32),
    Excepted("_experts_*_kernel", "wide loads", "gfx942", "*", AMD_GATHER),
    Excepted("_tree_attention_kernel", "wide loads", "sm_*", "fp32", FEW_LOADS),
    Excepted("_tree_attention_kernel", "wide loads", "gfx942", "*", FEW_LOADS),
    Excepted("_aux_projection_kernel", "spills", "sm_*", "fp32", FLOAT32),
    Excepted("_aux_projection_kernel", "wide loads", "gfx942", "fp32", AMD_FLOAT32),
    Excepted("_draft_logits_kernel", "wide loads", "gfx942", "fp32", AMD_FLOAT32),
    Excepted("_draft_vocab_kernel", "wide loads", "gfx942", "fp32", AMD_FLOAT32),
    Excepted("_gate_up_kernel", "wide loads", "gfx942", "fp32", AMD_FLOAT32),
    Excepted("_qkv_projection_kernel", "spills", "sm_*", "fp32", FLOAT32),
    Excepted("_scaled_linear_kernel", "wide loads", "gfx942", "fp8", AMD_ROWS),
    Excepted("_qkv_projection_kernel", "wide loads", "gfx942", "*", AMD_GATHER),
)


def broken_rules(kernel: str, target: str, facts: Facts) -> list[str]:
    """The rules that one compiled variant breaks."""
    operands = {OPERANDS[t] for t in facts.dot_types if t in OPERANDS}
    wanted = set().union(*(UNITS[target][operand] for operand in operands))
    # a product in float32 has its own units, or none
    units_differ = set(facts.matrix) != wanted and not ("f32" in facts.dot_types and not wanted)
    broken = {
        "spills": facts.spills > 0,
        "shared": facts.shared > SHARED_BYTES[target],
        "units": units_differ,
        "wide loads": kernel in STREAMED and facts.narrow_share > MOST_NARROW,
        "offsets": bool(facts.narrow_offsets),
    }
    assert broken.keys() == RULES.keys()
    return [rule for rule, is_broken in broken.items() if is_broken]
