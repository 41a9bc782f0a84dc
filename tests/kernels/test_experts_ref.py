"""Routed experts, FP8 and not, against the formula in float64 and Hugging Face's Llama 4."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from aerie.kernels.expert_matrix import ExpertMatrix, block_shape, check_matrix
from aerie.kernels.experts import experts, experts_ref
from aerie.kernels.quantize import FP8, GROUP, quantize_ref
from aerie.kernels.router import router_ref
from tests.evidence import exact, normal

SCALES = ("tensor", "channel", "block")
FORMATS = ("plain", *SCALES, "static")


@dataclass(frozen=True)
class Case:
    """T A E D F of one call."""

    T: int
    A: int
    E: int
    D: int
    F: int


def make_matrix(format: str, shape, device, dtype, seed: int) -> ExpertMatrix:
    """Normal weights whose outputs are of order one; FP8 ones with scales of that granularity."""
    weight = normal(shape, torch.float32, device, seed) * shape[2] ** -0.5
    if format == "plain":
        return ExpertMatrix(weight.to(dtype))
    experts, outputs, _ = shape
    sizes = {"channel": (experts, outputs, 1), "block": block_shape(weight)}
    sizes = sizes.get(format, (experts, 1, 1))
    scale = (torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) + 0.5).to(device)
    scale = scale * (weight.abs().max() / 448)
    static = torch.linspace(0.01, 0.02, experts, device=device) if format == "static" else None
    codes = (weight / weight.abs().max() * 448).to(FP8)
    return ExpertMatrix(codes, scale, static)


def make_inputs(case: Case, format: str, device, dtype=torch.float32, seed: int = 0):
    """x, routing, gate_up, down, shared."""
    x, shared = (normal((case.T, case.D), dtype, device, seed + i) for i in (1, 2))
    logits = normal((case.T, case.E), dtype, device, seed + 3)
    gate_up = make_matrix(format, (case.E, 2 * case.F, case.D), device, dtype, seed + 4)
    down = make_matrix(format, (case.E, case.D, case.F), device, dtype, seed + 5)
    return x, router_ref(logits, case.A), gate_up, down, shared


def restated(x, routing, gate_up, down, shared, first_expert=0):
    """The formula one pair at a time, in float64, with its own quantisation."""

    def place(size, parts):
        """Which of `parts` scales a number belongs to: its own, the only one, or its block's."""
        return torch.arange(size) // (1 if parts == size else GROUP if parts > 1 else size)

    def dequantise(matrix, e):
        weight = matrix.weight[e].double()
        if matrix.scale is None:
            return weight
        n, k = map(place, weight.shape, matrix.scale.shape[1:])
        return weight * matrix.scale[e].double()[n[:, None], k[None, :]]

    def rounded_to_codes(v, groups, static):
        out = v.clone()
        for start in range(0, len(v), groups):
            part = v[start : start + groups]
            s = part.abs().max() * (1.0 / 448) if static is None else static
            out[start : start + groups] = (part * (1 / s)).clamp(-448, 448).to(FP8).double() * s
        return out

    def static_of(matrix, e):
        s = matrix.input_scale
        return None if s is None else s[e if len(s) > 1 else 0].double()

    y = torch.zeros_like(x, dtype=torch.float64) if shared is None else shared.double().clone()
    for t, (ids, scores) in enumerate(zip(routing.ids_TA, routing.scores_TA, strict=True)):
        for e, score in zip(ids.tolist(), scores.double(), strict=True):
            e -= first_expert
            if not 0 <= e < len(gate_up.weight):
                continue
            row, factor = x[t].double(), score
            if static_of(gate_up, e) is not None:
                row, factor = row * score, torch.ones_like(score)
            if gate_up.is_fp8:
                width = GROUP if gate_up.is_blocked else len(row)
                row = rounded_to_codes(row, width, static_of(gate_up, e))
            gate, up = (dequantise(gate_up, e) @ row * factor).chunk(2)
            inner = F.silu(gate) * up
            if gate_up.is_fp8:
                inner = rounded_to_codes(inner, GROUP, static_of(down, e))
            y[t] += dequantise(down, e) @ inner
    return y


REF_CASES = [Case(5, 1, 4, 200, 140), Case(3, 2, 3, 130, 256), Case(1, 1, 2, 40, 33)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", REF_CASES, ids=str)
def test_ref_matches_the_formula(case, format, device, assert_close):
    inputs = make_inputs(case, format, device)
    assert_close(exact(experts_ref, *inputs), restated(*inputs), 1e-12)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_elsewhere_contribute_nothing(format, device, assert_close):
    """Two halves of the experts, each with half of the shared output, add up to the whole."""
    x, routing, gate_up, down, shared = make_inputs(Case(6, 2, 4, 130, 140), format, device)
    whole = exact(experts_ref, x, routing, gate_up, down, shared)
    parts = torch.zeros_like(whole)
    for first in (0, 2):
        own = [part_of(matrix, slice(first, first + 2)) for matrix in (gate_up, down)]
        parts += exact(experts_ref, x, routing, *own, shared / 2, first)
    assert_close(parts, whole, 1e-12)
    nothing = experts_ref(x, routing, gate_up, down, shared, 7)
    assert torch.equal(nothing, shared)


def of_rank(matrix: ExpertMatrix, rank: int, is_down: bool) -> ExpertMatrix:
    """A tensor-parallel half: gate's and up's outputs cut each, or down's inputs."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        if is_down:
            return x if x.shape[2] == 1 else x.chunk(2, dim=2)[rank].contiguous()
        if x.shape[1] == 1:
            return x
        return torch.cat([half.chunk(2, dim=1)[rank] for half in x.chunk(2, dim=1)], dim=1)

    scale = None if matrix.scale is None else cut(matrix.scale)
    return ExpertMatrix(cut(matrix.weight), scale, matrix.input_scale)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("apply", [experts, experts_ref], ids=["triton", "eager"])
def test_tensor_parallel_halves_add_up(format, apply, device, assert_close):
    """Cut at a multiple of 128 columns, so that no scale is shared by two ranks."""
    x, routing, gate_up, down, shared = make_inputs(Case(3, 2, 3, 130, 256), format, device)
    parts = [
        apply(x, routing, of_rank(gate_up, r, False), of_rank(down, r, True), shared / 2)
        for r in (0, 1)
    ]
    assert_close(parts[0] + parts[1], apply(x, routing, gate_up, down, shared), 2e-5)


@pytest.mark.parametrize(
    ("apply", "dtype"), [(experts, torch.float16), (experts_ref, torch.bfloat16)]
)
def test_fp8_channels_are_within_a_hundredth(apply, dtype, device):
    """Of the products of the dequantised weights and codes; rounding rows to codes costs more.

    On a CPU: 0.0002 (float16) and 0.0016 (bfloat16) against the codes, of whose few bits both are
    0.05 away from rows that nobody rounded.
    """
    x, routing, gate_up, down, _ = make_inputs(Case(4, 1, 2, 512, 256), "channel", device, dtype)
    unrounded = [ExpertMatrix(torch.stack([m.rows_of(e) for e in (0, 1)])) for m in (gate_up, down)]
    y, codes = apply(x, routing, gate_up, down), restated(x, routing, gate_up, down, None)
    rows = restated(x, routing, *unrounded, None)
    assert (y - codes).norm() <= 1e-2 * codes.norm()
    assert (y - rows).norm() <= 6e-2 * rows.norm()


@pytest.mark.parametrize("format", ["plain", "channel"])
def test_unchosen_experts_are_not_read(format, device):
    x, routing, gate_up, down, shared = make_inputs(Case(3, 1, 3, 72, 40), format, device)
    routing = replace(routing, ids_TA=torch.tensor([[0], [2], [0]], device=device).int())
    for matrix in (gate_up, down):
        raw = matrix.weight.view(torch.uint8) if matrix.is_fp8 else matrix.weight
        raw[1] = 0x7F if matrix.is_fp8 else torch.nan
    assert experts_ref(x, routing, gate_up, down, shared).isfinite().all()


def part_of(matrix: ExpertMatrix, experts: slice) -> ExpertMatrix:
    scales = matrix.scale, matrix.input_scale
    return ExpertMatrix(matrix.weight[experts], *(s if s is None else s[experts] for s in scales))


@pytest.mark.parametrize("choices", [1, 2])
def test_ref_matches_hugging_face(choices, assert_close, device):
    config = Llama4TextConfig(
        hidden_size=48, intermediate_size=40, num_local_experts=4, num_experts_per_tok=choices
    )
    moe = Llama4TextMoe(config).to(device)
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.3)
    x = torch.randn(6, 48, device=device)
    with torch.no_grad():
        expected, logits = moe(x)
        shared = moe.shared_expert(x)
    stored = moe.experts.gate_up_proj.data, moe.experts.down_proj.data
    matrices = [ExpertMatrix(weight.transpose(1, 2)) for weight in stored]
    actual = experts_ref(x, router_ref(logits, choices), *matrices, shared)
    assert_close(actual, expected, 2e-6)


def test_given_codes_are_used(device):
    x, routing, gate_up, down, shared = make_inputs(Case(4, 2, 3, 200, 140), "channel", device)
    codes = quantize_ref(x)
    expected = experts_ref(x, routing, gate_up, down, shared)
    garbage = torch.full_like(x, torch.nan)
    actual = experts_ref(garbage, routing, gate_up, down, shared, quantized=codes)
    assert torch.equal(actual, expected)


def bad_matrices(matrix: ExpertMatrix):
    """What must not pass for `matrix`, per channel with a static input scale, and the words."""
    weight, scale, static = matrix.weight, matrix.scale, matrix.input_scale
    assert scale is not None
    assert static is not None
    experts, outputs, inputs = weight.shape
    yield (
        replace(matrix, weight=weight.float().to(torch.float8_e5m2)),
        "weight: must be .* got torch.float8_e5m2",
    )
    fnuz = weight.view(torch.uint8).view(torch.float8_e4m3fnuz)
    yield (
        replace(matrix, weight=fnuz),
        "weight: must be .* got torch.float8_e4m3fnuz; other FP8 formats",
    )
    yield replace(matrix, weight=weight.double()), "weight: must be .* got torch.float64"
    yield replace(matrix, weight=weight[0]), r"weight: must be output-major \[3, 24, 16\]"
    yield replace(matrix, weight=weight.mT.contiguous()), r"weight: must be output-major"
    yield replace(matrix, weight=weight.mT.contiguous().mT), "weight: must be contiguous"
    yield ExpertMatrix(weight), "scale: must come with FP8 weights .* none for .* weight_scale"
    yield ExpertMatrix(weight.float(), scale), "scale: must come with FP8 .* one for torch.float32"
    for shape in ((experts,), (experts, outputs), (experts, 1, inputs), (1, outputs, 1), (1, 1, 1)):
        yield replace(matrix, scale=torch.ones(shape)), r"scale: must be float32 \(3, 1, 1\) per"
    yield replace(matrix, scale=scale.bfloat16()), "scale: must be float32 .* got torch.bfloat16"
    yield replace(matrix, scale=scale[:1].expand(3, 24, 1)), "scale: must be contiguous"
    yield ExpertMatrix(weight.float(), None, static), "input_scale: must come with FP8 weights only"
    yield replace(matrix, input_scale=static[:2]), r"input_scale: must be float32 \(3,\) or \(1,\)"
    yield replace(matrix, input_scale=static.half()), "input_scale: must be float32"


def test_bad_matrices_are_named():
    x = torch.randn(2, 16)
    good = make_matrix("channel", (3, 24, 16), x.device, x.dtype, 0)
    good = replace(good, input_scale=torch.ones(3))
    check_matrix("down", good, 3, 24, 16, x)
    for bad, words in bad_matrices(good):
        with pytest.raises(ValueError, match=rf"down\.{words}"):
            check_matrix("down", bad, 3, 24, 16, x)
    blocked = make_matrix("block", (3, 300, 200), x.device, x.dtype, 0)
    static = replace(blocked, input_scale=torch.ones(1))
    with pytest.raises(ValueError, match="down.input_scale: block-scaled weights take"):
        check_matrix("down", static, 3, 300, 200, x)
