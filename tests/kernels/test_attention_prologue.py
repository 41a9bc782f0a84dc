"""The attention prologue against its reference, which is the chain of the single references.

Regimes: Llama 4's RoPE layers (interleaved, normed), its NoPE layers (temperature), llama-type
drafts (half), nothing at all; head counts and head dims off the tile, rows of a wider projection,
no rows; padding rows (negative slots), pages of 1 to 16; positions on both sides of a temperature
step; FP8 caches, scales per tensor and per head, values beyond 448 and NaN; a NaN head, slots past
2^31 elements, unequal runs, bad arguments. FP8 codes are powers of two and their multiples here:
the interpreter rounds to FP8 wrongly.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerie.kernels.attention_prologue import (
    Temperature,
    _attention_prologue_op,
    _launch_config,
    attention_prologue,
    attention_prologue_ref,
)
from aerie.kernels.rotation import inverse_frequencies, rotation_ref
from tests.evidence import (
    VAST,
    assert_as_accurate,
    check_compiles,
    edges,
    few_examples,
    guarded,
    laid_out,
    layouts,
    on_gpu,
    same_bits,
    vast,
)

EPS, FP8 = 1e-5, torch.float8_e4m3fn
MODES = ["llama4 rope", "llama4 nope", "draft", "copy", "all"]
CASES = [(5, 10, 2, 32, 4), (1, 1, 1, 16, 1), (3, 5, 1, 24, 16), (0, 2, 1, 16, 4), (2, 7, 3, 80, 2)]
REAL = on_gpu((1, 40, 8, 128, 16), (64, 40, 8, 128, 64), (4096, 40, 8, 128, 16))


def _inputs(case, device, dtype=torch.float32):
    """qkv, the two caches with what must stay in them, and distinct slots."""
    rows, heads, kv_heads, head_dim, page_size = case
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    shape = (2, rows + 2, page_size, kv_heads, head_dim)
    caches = torch.randn(shape, device=device).to(dtype)
    return qkv, caches, torch.randperm(shape[1] * page_size, device=device)[:rows]


def _options(mode, rows, head_dim, device):
    positions = torch.randint(300, (rows,), device=device)
    rotation = rotation_ref(positions, inverse_frequencies(head_dim, 1e4, None).to(device))
    warm = Temperature(positions, 64.0, 0.1)
    return {
        "llama4 rope": {"rotation": rotation, "qk_norm_eps": EPS},
        "llama4 nope": {"temperature": warm},
        "draft": {"rotation": rotation, "layout": "half"},
        "copy": {},
        "all": {"rotation": rotation, "qk_norm_eps": EPS, "temperature": warm},
    }[mode]


def _run(op, qkv, caches, slots, **options):
    """The queries and the caches after a run on a guarded copy of them."""
    in_place, check = guarded(caches.shape, caches.dtype, caches.device)
    in_place.copy_(caches)
    q = op(qkv, in_place[0], in_place[1], slots, **options)
    check()
    return q, in_place


def _check(qkv, caches, slots, **options):
    q, written = _run(attention_prologue, qkv, caches, slots, **options)
    again = _run(attention_prologue, qkv, caches, slots, **options)
    assert same_bits(q, again[0])
    assert same_bits(written, again[1])
    eager, eager_caches = _run(attention_prologue_ref, qkv, caches, slots, **options)
    wide = (qkv.double(), caches.double(), slots)
    truth, true_caches = _run(attention_prologue_ref, *wide, **options)
    assert q.is_contiguous()
    assert_as_accurate(q, truth, eager)
    for side in (0, 1):
        assert_as_accurate(written[side], true_caches[side], eager_caches[side])
    assert same_bits(written[1], eager_caches[1])  # values are moved
    untouched = torch.ones(caches.shape[1] * caches.shape[2], dtype=torch.bool)
    untouched[slots[slots >= 0].cpu()] = False
    flat = [x[0].flatten(0, 1)[untouched.to(x.device)] for x in (written, caches)]
    assert same_bits(*flat)
    return q, written


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=str)
def test_as_accurate_as_eager(case, mode, device, dtypes):
    for dtype in dtypes:
        _check(*_inputs(case, device, dtype), **_options(mode, case[0], case[3], device))


@few_examples
@given(edges(4, 6), edges(3, 5), st.sampled_from(MODES), layouts())
def test_any_shape_and_layout(device, rows, heads, mode, layout):
    torch.manual_seed(rows)
    qkv, caches, slots = _inputs((rows, heads, 2, 16, 4), device)
    _check(laid_out(qkv, layout), caches, slots, **_options(mode, rows, 16, device))


@pytest.mark.parametrize("padding", [[0], [1, 4], [0, 1, 2, 3, 4]], ids=str)
def test_padding_rows_write_nothing(padding, device):
    qkv, caches, slots = _inputs(CASES[0], device)
    slots[padding] = -1
    qkv[padding] = torch.nan
    _, written = _run(attention_prologue, qkv, caches, slots, **_options("all", 5, 32, device))
    assert written.isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_head_keeps_its_nan(poison, device):
    case = (3, 4, 2, 16, 4)
    qkv, caches, slots = _inputs(case, device)
    options = _options("all", 3, 16, device)
    clean = _run(attention_prologue, qkv, caches, slots, **options)
    qkv.view(3, 8, 16)[1, 2, 5] = poison
    qkv.view(3, 8, 16)[2, 7, 3] = poison
    q, written = _run(attention_prologue, qkv, caches, slots, **options)
    others = [h for h in range(12) if h != 6]
    assert same_bits(q.view(12, 16)[others], clean[0].view(12, 16)[others])
    assert same_bits(written[0], clean[1][0])
    spoilt = written[1].flatten(0, 1)[slots[2], 1]
    kept = [k for k in range(16) if k != 3]
    assert not spoilt[3].isfinite()
    assert same_bits(spoilt[kept], clean[1][1].flatten(0, 1)[slots[2], 1][kept])


def test_temperature_steps(device):
    """floor((position + 1) / 8192) changes at 8191, and Llama 4 is at rest before."""
    qkv, caches, slots = _inputs((4, 2, 1, 16, 4), device)
    positions = torch.tensor([0, 8190, 8191, 16383], device=device)
    q, _ = _check(qkv, caches, slots, temperature=Temperature(positions, 8192.0, 0.1))
    plain = qkv[:, :32].view(4, 2, 16)
    assert same_bits(q[:2], plain[:2])
    assert (q[2:].abs() > plain[2:].abs()).all()


@pytest.mark.parametrize("scales", [(1, 1), (2, 2), (1, 2)], ids=str)
def test_fp8_cache(scales, device, dtypes):
    for dtype in dtypes:
        qkv, _, slots = _inputs((5, 4, 2, 16, 4), device)
        exponents = torch.randint(-6, 5, qkv.shape, device=device)
        qkv = (torch.randint(-7, 8, qkv.shape, device=device) * 2.0**exponents).to(dtype)
        qkv[1, -3:] = torch.tensor([60000.0, -60000.0, torch.nan], device=device)
        slots[3] = -1
        caches = torch.randn(2, 7, 4, 2, 16, device=device).to(FP8)
        k_scale, v_scale = (2.0 ** torch.arange(n, device=device) / 8 for n in scales)
        options = {"k_scale": k_scale, "v_scale": v_scale}
        expected = caches.clone()
        q = attention_prologue(qkv, caches[0], caches[1], slots, **options)
        q_ref = attention_prologue_ref(qkv, expected[0], expected[1], slots, **options)
        assert same_bits(q, q_ref)
        codes, codes_ref = caches.view(torch.uint8), expected.view(torch.uint8)
        is_nan = codes_ref & 0x7F == 0x7F
        if device.type == "cpu":  # the interpreter makes 256 of NaN
            codes[is_nan] = codes_ref[is_nan]
        zero = codes_ref & 0x7F == 0
        assert torch.equal(codes[~zero], codes_ref[~zero])
        assert (codes[zero] & 0x7F == 0).all()


def test_slots_beyond_32_bit_offsets(device):
    qkv, _, _ = _inputs((2, 2, 1, 16, 4), device, torch.float16)
    cache = vast(128, torch.float16, device)[: VAST + 128].view(-1, 4, 1, 16)
    last = 4 * len(cache) - 1
    slots = torch.tensor([last, 2], device=device)
    attention_prologue(qkv, cache[:-1], cache[1:], slots - 4)
    flat = cache.view(-1, 1, 16)
    assert same_bits(flat[[last - 4]], qkv[:1, 32:48].view(1, 1, 16))
    assert same_bits(flat[[last]], qkv[:1, 48:].view(1, 1, 16))


def test_compiles_once_for_all_row_counts(device):
    qkv, caches, slots = _inputs((5, 4, 2, 16, 4), device)
    rotation = rotation_ref(torch.arange(5), inverse_frequencies(16, 1e4, None)).__dict__
    cos, sin = rotation["cos_TJ"].to(device), rotation["sin_TJ"].to(device)

    def run(qkv, slots, cos, sin):
        from aerie.kernels.rotation import Rotation

        turned = Rotation(cos, sin)
        q = attention_prologue(qkv, caches[0], caches[1], slots, rotation=turned, layout="half")
        return [q, caches]

    check_compiles(run, qkv[:3], slots[:3], cos[:3], sin[:3], again=(qkv, slots, cos, sin))


def test_opcheck(device):
    qkv, caches, slots = _inputs((3, 2, 1, 16, 4), device)
    positions = torch.arange(3, device=device)
    rest = (None, None, True, None, positions, 8.0, 0.1, None, None)
    torch.library.opcheck(_attention_prologue_op, (qkv, caches[0], caches[1], slots, *rest))


def test_rejects_bad_arguments(device):
    qkv, (k_cache, v_cache), slots = _inputs((3, 2, 1, 16, 4), device)
    good = {"qkv_TF": qkv, "k_cache_RCGK": k_cache, "v_cache_RCGK": v_cache, "slots_T": slots}
    rope = _options("llama4 rope", 3, 16, device)
    one = torch.ones(1, device=device)
    for message, changed in (
        ("qkv_TF: must be", {"qkv_TF": qkv[:, :-1]}),
        ("qkv_TF: must be", {"qkv_TF": qkv[:, :32]}),
        ("qkv_TF: must be", {"qkv_TF": qkv.t().contiguous().t()}),
        ("qkv_TF: must be one of", {"qkv_TF": qkv.double()}),
        ("k_cache_RCGK: must be a contiguous", {"k_cache_RCGK": k_cache.transpose(0, 1)}),
        ("v_cache_RCGK: must be torch.float32 or", {"v_cache_RCGK": v_cache.half()}),
        ("v_cache_RCGK: must be torch.float32 ", {"v_cache_RCGK": v_cache[1:]}),
        ("slots_T: must be a contiguous int64", {"slots_T": slots[:2]}),
        ("slots_T: must be a contiguous int64", {"slots_T": slots.int()}),
        ("layout: must be 'interleaved' or 'half'", {"layout": "neox"}),
        ("qk_norm_eps: the norm follows a rotation", {"qk_norm_eps": EPS}),
        ("rotation.cos_TJ: must be a contiguous", _options("draft", 2, 16, device)),
        ("temperature.positions_T: must be", {"temperature": Temperature(slots[:1], 8.0, 0.1)}),
        ("temperature.floor_scale: must be", {"temperature": Temperature(slots, 0.0, 0.1)}),
        ("k_scale: must be given with", {"k_scale": one, "v_scale": one} | rope),
        ("v_scale: must be given with", {
            "k_cache_RCGK": k_cache.to(FP8), "v_cache_RCGK": v_cache.to(FP8), "k_scale": one,
        }),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attention_prologue(**(good | changed))


@pytest.mark.parametrize("pairs", [1, 8, 12, 64, 128])
def test_launch_config(pairs):
    config = _launch_config(pairs)
    assert pairs <= config.BLOCK_J
    assert 512 <= config.BLOCK_HEADS * config.BLOCK_J <= 1024
