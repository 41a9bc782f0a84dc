"""FP8 weights in the projections that share `weight_stream`: scales by block, bytes and pairs.

Regimes: blocks that the last rows and columns do not fill, gate and up in one block, inputs of
several blocks, split depth, 128-wide tiles, norms; columns that cannot be read in pairs because
their number, stride or start is odd; bad scales.
"""

import pytest
import torch

from aerie.kernels import stream_launch
from aerie.kernels.aux_projection import TapNorm, aux_projection, aux_projection_ref
from aerie.kernels.draft_logits import FinalNorm, draft_logits, draft_logits_ref
from aerie.kernels.draft_vocab import draft_vocab, draft_vocab_ref
from aerie.kernels.gate_up import gate_up, gate_up_ref
from aerie.kernels.linear import linear, linear_ref
from aerie.kernels.qkv_projection import qkv_projection, qkv_projection_ref
from tests.evidence import assert_as_accurate, exact, normal

FP8 = torch.float8_e4m3fn


def _fp8(features, depth, device):
    """A weight and a scale per block, no two of which are alike."""
    blocks = (-(-features // 128), -(-depth // 128))
    scale = torch.arange(1.0, 1 + blocks[0] * blocks[1], device=device).view(blocks) / 8
    return normal((features, depth), torch.float32, device, 2).to(FP8), scale


def _linear(rows, dtype, device):
    weight, scale = _fp8(200, 300, device)
    return linear, linear_ref, (normal((rows, 300), dtype, device, 1), weight, None, scale)


def _gate_up(rows, dtype, device):
    weight, scale = _fp8(2 * 90, 300, device)
    x = normal((rows, 300), dtype, device, 1)
    return (
        lambda x, weight, scale: gate_up(x, weight, scale=scale),
        lambda x, weight, scale: gate_up_ref(x, weight, scale=scale),
        (x, weight, scale / 8),
    )


def _qkv_projection(rows, dtype, device):
    weight, scale = _fp8(150, 2 * 256, device)
    table, hidden = normal((9, 256), dtype, device, 1), normal((rows, 256), dtype, device, 3)
    gain, ids = normal((256,), dtype, device, 4), torch.arange(rows, device=device) % 9
    return qkv_projection, qkv_projection_ref, (ids, table, hidden, gain, gain, 1e-5, weight, scale)


def _aux_projection(rows, dtype, device):
    weight, scale = _fp8(150, 3 * 128, device)
    taps = [normal((rows, 128), dtype, device, i) for i in range(3)]
    gains = [normal((128,), dtype, device, 9 + i) for i in range(3)]

    def call(op):
        return lambda taps, weight, gains, scale: op(
            taps, weight, norm=TapNorm(tuple(gains), 1e-5), scale_F=scale
        )

    return call(aux_projection), call(aux_projection_ref), (taps, weight, gains, scale)


def _draft_logits(rows, dtype, device):
    weight, scale = _fp8(200, 300, device)
    hidden, gain = normal((rows, 300), dtype, device, 1), normal((300,), dtype, device, 4)

    def call(op):
        return lambda hidden, weight, gain, scale: op(
            hidden, weight, norm=FinalNorm(gain, 1e-5), scale_U=scale
        )

    return call(draft_logits), call(draft_logits_ref), (hidden, weight, gain, scale)


PROJECTIONS = [_linear, _gate_up, _qkv_projection, _aux_projection, _draft_logits]


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("rows", "shares"), [(3, 1), (3, 2), (70, 1)])
def test_block_scales(projection, rows, shares, device, dtypes, monkeypatch):
    segments = {_qkv_projection: 2, _aux_projection: 3}.get(projection, 1)
    splits = shares * segments if shares > 1 else 1
    if projection is not _draft_logits:  # a head has no split
        monkeypatch.setattr(stream_launch, "_splits", lambda *_: splits)
    for dtype in dtypes:
        kernel, reference, arguments = projection(rows, dtype, device)
        truth, eager = exact(reference, *arguments), reference(*arguments)
        assert_as_accurate(kernel(*arguments), truth, eager)


def test_block_scales_of_a_head(device):
    weight, scale = _fp8(200, 300, device)
    hidden = normal((3, 300), torch.float32, device, 1)
    actual = draft_vocab(hidden, weight, None, 4, scale_U=scale)
    expected = draft_vocab_ref(hidden, weight, None, 4, scale_U=scale)
    assert torch.equal(actual.ids_TA, expected.ids_TA)
    torch.testing.assert_close(actual.logprobs_TA, expected.logprobs_TA, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [64, 131])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("stride", [300, 301])
def test_pairs_where_the_layout_allows_them(depth, start, stride, device, dtypes):
    storage = normal((40, stride), torch.float32, device, 2).to(FP8)
    weight, scale = storage[:, start : start + depth], torch.rand(40, device=device) + 0.1
    is_packed = stream_launch.streamed(weight, depth).dtype == torch.int16
    assert is_packed == (depth % 2 == start == stride % 2 == 0)
    for dtype in dtypes:
        arguments = (normal((3, depth), dtype, device, 1), weight, None, scale)
        truth, eager = exact(linear_ref, *arguments), linear_ref(*arguments)
        assert_as_accurate(linear(*arguments), truth, eager)


def test_a_pair_never_spans_two_inputs(device):
    assert stream_launch.streamed(torch.empty(4, 6, dtype=FP8), 3).dtype == FP8
    assert stream_launch.streamed(torch.empty(4, 6, dtype=FP8), 2).dtype == torch.int16
    assert stream_launch.streamed(torch.empty(4, 6), 2).dtype == torch.float32


def test_every_code_has_its_value(device):
    codes = torch.arange(256, device=device).to(torch.uint8)
    codes[[127, 255]] = 0  # NaN
    weight = torch.stack([codes, codes.flip(0)]).view(FP8)
    x = torch.eye(256, device=device)
    y = linear(x, weight, None, torch.ones(1, device=device))
    assert torch.equal(y, weight.float().t())


def test_rejects_bad_scales(device):
    weight, scale = _fp8(200, 300, device)
    x = torch.ones(2, 300, device=device)
    shape = r"scale_F: must be a contiguous \[200\] or \[1\] or \[2, 3\] of torch.float32"
    for bad in (scale[:1], scale.half(), scale.t().contiguous().t(), scale.flatten()):
        with pytest.raises(ValueError, match=shape):
            linear(x, weight, None, bad)
    weight, scale = _fp8(200, 3 * 64, device)
    with pytest.raises(ValueError, match="scale_F: blocks of 128 .* 64 wide: use a scale per row"):
        aux_projection([x[:, :64]] * 3, weight, scale_F=scale)
