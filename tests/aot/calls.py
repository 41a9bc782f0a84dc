"""Representative calls of every op, at the widths of Llama 4 and its EAGLE-3 drafts.

A new op is one function here, named as its module. `rows` is a size class of T and `kind` a dtype,
or "fp8" for bfloat16 rows with FP8 weights; an op without FP8 weights makes no call for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from aerie.kernels import accept as _accept
from aerie.kernels import argmax as _argmax
from aerie.kernels import attention_prologue as _prologue
from aerie.kernels import attention_temperature as _attention_temperature
from aerie.kernels import aux_projection as _aux_projection
from aerie.kernels import cache_commit as _cache_commit
from aerie.kernels import draft_logits as _draft_logits
from aerie.kernels import draft_vocab as _draft_vocab
from aerie.kernels import draw as _draw
from aerie.kernels import embedding as _embedding
from aerie.kernels import expert_order as _expert_order
from aerie.kernels import experts as _experts
from aerie.kernels import gate_up as _gate_up
from aerie.kernels import kv_append as _kv_append
from aerie.kernels import linear as _linear
from aerie.kernels import moe_prologue as _moe_prologue
from aerie.kernels import qkv_projection as _qkv_projection
from aerie.kernels import quantize as _quantize
from aerie.kernels import rms_norm as _rms_norm
from aerie.kernels import rope as _rope
from aerie.kernels import rotation as _rotation
from aerie.kernels import router as _router
from aerie.kernels import row_filter as _row_filter
from aerie.kernels import scaled_linear as _scaled_linear
from aerie.kernels import swiglu as _swiglu
from aerie.kernels import target_probs as _target_probs
from aerie.kernels import tree_attention as _tree_attention
from aerie.kernels.expert_matrix import ExpertMatrix, block_shape

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,
}
# classes of T: a token, trees, short prompts whose depth is split, a prompt
SIZES = (1, 5, 8, 16, 24, 32, 64, 96, 256, 1024, 4096)
BETWEEN = (6, 12, 20, 48, 100, 200, 1000)  # must launch nothing that the classes do not
H, G, K, D, F, E, V, U = 40, 8, 128, 5120, 8192, 16, 202048, 32000
EPS = 1e-5


def kinds(target: str) -> list[str]:
    """sm_80 has no FP8."""
    return [kind for kind in DTYPES if kind != "fp8" or target != "sm_80"]


CALLS: dict[str, Callable[[int, str], None]] = {}
STREAMED: set[str] = set()  # kernels whose time is the reading of a weight or of a cache


def op(*streamed: str, fp8: bool = False):
    """Registers the calls of the op that the function is named after."""

    def register(call):
        def made(rows: int, kind: str) -> None:
            if fp8 or kind != "fp8":
                call(rows, kind)

        CALLS[call.__name__] = made
        STREAMED.update(streamed)
        return call

    return register


def floats(kind: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[kind])


def weight(kind: str, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float8_e4m3fn if kind == "fp8" else DTYPES[kind])


def scale(kind: str, features: int) -> Tensor | None:
    return torch.empty(features) if kind == "fp8" else None


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@op()
def accept(rows: int, kind: str) -> None:
    ids = integers(min(rows, 64))
    _accept.accept(ids, ids, ids, integers(2, dtype=torch.int32), 8)


@op()
def argmax(rows: int, kind: str) -> None:
    _argmax.argmax(floats(kind, rows, V))
    _argmax.argmax_keys(floats(kind, rows, V // 8), V // 8)  # one rank of eight


@op()
def attention_temperature(rows: int, kind: str) -> None:
    q = floats(kind, rows, H, K)
    _attention_temperature.attention_temperature(q, integers(rows), 8192.0, 0.1)


@op("_aux_projection_kernel", fp8=True)
def aux_projection(rows: int, kind: str) -> None:
    x, matrix, scales = floats(kind, rows, D), weight(kind, D, 3 * D), scale(kind, D)
    gains = floats(kind, 3 * D)
    _aux_projection.aux_projection([x] * 3, matrix, scale_F=scales)
    per_tap = _aux_projection.TapNorm(gains.split(D), EPS)
    _aux_projection.aux_projection([x] * 3, matrix, residuals=[x] * 3, norm=per_tap, scale_F=scales)
    if rows == 64:
        joint = _aux_projection.JointNorm(gains, EPS)
        _aux_projection.aux_projection([x] * 3, matrix, norm=joint, scale_F=scales)


@op(fp8=True)
def cache_commit(rows: int, kind: str) -> None:
    layers, slots = weight(kind, 2, 4, 64, G, K), integers(rows)
    _cache_commit.cache_commit(layers, layers, slots, slots)


@op("_draft_logits_kernel", fp8=True)
def draft_logits(rows: int, kind: str) -> None:
    head, norm = weight(kind, U, D), _draft_logits.FinalNorm(floats(kind, D), EPS)
    _draft_logits.draft_logits(floats(kind, rows, D), head, norm=norm, scale_U=scale(kind, U))


@op("_draft_vocab_kernel", fp8=True)
def draft_vocab(rows: int, kind: str) -> None:
    hidden, head, d2t = floats(kind, rows, D), weight(kind, U, D), integers(U)
    norm = _draft_logits.FinalNorm(floats(kind, D), EPS)
    for k in (1, 8, 16) if rows == 64 else (1, 8):
        _draft_vocab.draft_vocab(hidden, head, d2t, k, norm=norm, scale_U=scale(kind, U))


@op()
def draw(rows: int, kind: str) -> None:
    per_row, ids = torch.empty(rows), integers(rows)
    kept = _row_filter.RowFilter(
        per_row, per_row, per_row, integers(rows, dtype=torch.int32), per_row
    )
    _draw.draw(floats(kind, rows, V), kept, ids, ids)
    _draw.draw_keys(floats(kind, rows, V // 8), kept, ids, ids, V // 8)  # one rank of eight


@op()
def embedding(rows: int, kind: str) -> None:
    _embedding.embedding(integers(rows), floats(kind, V, D))


@op()
def expert_order(rows: int, kind: str) -> None:
    _expert_order.expert_order(integers(rows, 1, dtype=torch.int32), E)
    _expert_order.expert_order(integers(rows, 1, dtype=torch.int32), 128)


def expert_matrix(kind: str, outputs: int, inputs: int, scales: str) -> ExpertMatrix:
    matrix = weight(kind, E, outputs, inputs)
    if kind != "fp8":
        return ExpertMatrix(matrix)
    shape = {"channel": (E, outputs, 1), "static": (E, 1, 1), "block": block_shape(matrix)}[scales]
    return ExpertMatrix(matrix, torch.empty(shape), torch.empty(1) if scales == "static" else None)


@op("_experts_gate_up_kernel", "_experts_down_kernel", fp8=True)
def experts(rows: int, kind: str) -> None:
    x = floats(kind, rows, D)
    for choices in (1, 2) if rows in (8, 4096) else (1,):
        ids = integers(rows, choices, dtype=torch.int32)
        routing = _router.Routing(ids, floats(kind, rows, choices))
        for scales in ("channel", "static", "block") if kind == "fp8" else ("none",):
            first = expert_matrix(kind, 2 * F, D, scales)
            second = expert_matrix(kind, D, F, scales)
            _experts.experts(x, routing, first, second, x)


@op("_gate_up_kernel", fp8=True)
def gate_up(rows: int, kind: str) -> None:
    _gate_up.gate_up(floats(kind, rows, D), weight(kind, 2 * F, D), scale=scale(kind, 2 * F))


@op()
def kv_append(rows: int, kind: str) -> None:
    k, cache = floats(kind, rows, G, K), floats(kind, 4, 64, G, K)
    _kv_append.kv_append(k, k, cache, cache, integers(rows))


@op("_linear_kernel", fp8=True)
def linear(rows: int, kind: str) -> None:
    x, matrix = floats(kind, rows, D), weight(kind, D, D)
    _linear.linear(x, matrix, None, scale(kind, D))
    if kind == "fp8":  # the K loop, where the scales of blocks are read, is that of all projections
        _linear.linear(x, matrix, None, torch.empty(D // 128, D // 128))


@op(fp8=True)
def moe_prologue(rows: int, kind: str) -> None:
    x, gain = floats(kind, rows, D), floats(kind, D)
    for experts in (E, 128):
        router = floats(kind, experts, D)
        for codes in ("row", "group") if kind == "fp8" else ("none",):
            _moe_prologue.moe_prologue(x, x, gain, EPS, router, 1, codes)


@op("_qkv_projection_kernel", fp8=True)
def qkv_projection(rows: int, kind: str) -> None:
    features, gain = (H + 2 * G) * K, floats(kind, D)
    _qkv_projection.qkv_projection(
        integers(rows), floats(kind, U, D), floats(kind, rows, D), gain, gain, EPS,
        weight(kind, features, 2 * D), scale(kind, features),
    )  # fmt: skip


@op(fp8=True)
def quantize(rows: int, kind: str) -> None:
    if kind == "fp8":
        for grouped, static in ((False, None), (True, None), (False, torch.empty(1))):
            _quantize.quantize(floats(kind, rows, D), grouped, static)


@op()
def rms_norm(rows: int, kind: str) -> None:
    x, gain = floats(kind, rows, D), floats(kind, D)
    _rms_norm.rms_norm(x, gain, EPS)
    _rms_norm.add_rms_norm(x, x, gain, EPS)


@op()
def rope(rows: int, kind: str) -> None:
    q, k = floats(kind, rows, H, K), floats(kind, rows, G, K)
    angles = _rotation.Rotation(torch.empty(rows, K // 2), torch.empty(rows, K // 2))
    _rope.rope(q, k, angles, "interleaved", EPS)  # Llama 4
    _rope.rope(q, k, angles, "half", None)  # its drafts


@op()
def rotation(rows: int, kind: str) -> None:
    _rotation.rotation(integers(rows), torch.empty(K // 2))


@op()
def router(rows: int, kind: str) -> None:
    _router.router(floats(kind, rows, E), 1)


@op()
def row_filter(rows: int, kind: str) -> None:
    per_row = torch.empty(rows)
    logits, top_k = floats(kind, rows, V), integers(rows)
    _row_filter.row_filter(logits, per_row)
    _row_filter.row_filter(logits, per_row, top_k, per_row, per_row)


@op("_scaled_linear_kernel", fp8=True)
def scaled_linear(rows: int, kind: str) -> None:
    if kind != "fp8":
        return
    codes, matrix = weight(kind, rows, D), weight(kind, D, D)
    blocks = torch.empty(rows, D // 128), torch.empty(D // 128, D // 128)
    per_row, per_block = (_quantize.Quantized(codes, s) for s in (torch.empty(rows, 1), blocks[0]))
    target = _scaled_linear.target_of(codes)
    if not _scaled_linear.takes_scaled_mm(target, rows, D, D, False, torch.bfloat16):
        _scaled_linear.scaled_linear(per_row, matrix, torch.empty(D))
    _scaled_linear.scaled_linear(per_block, matrix, blocks[1])


@op()
def swiglu(rows: int, kind: str) -> None:
    _swiglu.swiglu(floats(kind, rows, F), floats(kind, rows, F))


@op()
def target_probs(rows: int, kind: str) -> None:
    per_row = torch.empty(rows)
    kept = _row_filter.RowFilter(
        per_row, per_row, per_row, integers(rows, dtype=torch.int32), per_row
    )
    logits = floats(kind, rows, V)
    _target_probs.target_probs(logits, integers(rows, 8), kept)
    _target_probs.draft_vocab_probs(logits, integers(U), U, kept)


@op(fp8=True)
def attention_prologue(rows: int, kind: str) -> None:
    angles = _rotation.Rotation(torch.empty(rows, K // 2), torch.empty(rows, K // 2))
    nope = _prologue.Temperature(integers(rows), 8192.0, 0.1)
    for options in (
        {"rotation": angles, "layout": "interleaved", "qk_norm_eps": 1e-5},
        {"temperature": nope},
        {"rotation": angles, "layout": "half"},  # a draft of the llama kind
    ):
        _prologue.attention_prologue(
            floats(kind, rows, (H + 2 * G) * K),
            weight(kind, 64, 64, G, K),
            weight(kind, 64, 64, G, K),
            integers(rows),
            **options,
            **kv_scales(kind),
        )


def kv_scales(kind: str) -> dict[str, Tensor]:
    return {"k_scale": torch.empty(1), "v_scale": torch.empty(1)} if kind == "fp8" else {}


@op("_tree_attention_kernel", fp8=True)
def tree_attention(rows: int, kind: str) -> None:
    head_dims = (128, 64) if kind in ("bf16", "fp8") and rows in (1, 8, 256) else (128,)
    for head_dim in head_dims:  # 64: as served; fp16 compiles as bf16 does
        attend(rows, kind, head_dim)


def attend(rows: int, kind: str, head_dim: int) -> None:
    q, cache = floats(kind, rows, H, head_dim), weight(kind, 64, 64, G, head_dim)
    is_tree = 1 < rows <= 64  # one row and prompts are chains
    step = _tree_attention.TreeRows(
        positions_T=integers(rows),
        row_starts_B1=integers(2, dtype=torch.int32),
        prefix_lengths_B=integers(1, dtype=torch.int32),
        page_table_BM=integers(1, 64, dtype=torch.int32),
        ancestors_T=integers(rows) if is_tree else None,
        max_rows=rows,
    )
    for chunk_size in (8192, None):  # the local and the global layers of Llama 4
        _tree_attention.tree_attention(
            q, cache, cache, step, chunk_size, head_dim**-0.5, **kv_scales(kind)
        )
