"""Linear layer against its reference.

Regimes: every dimension off its tile, one row, more rows than a tile, several tiles of depth, no
rows, with and without bias, strided rows and weights, NaN in one row, bad arguments.
"""

import pytest
import torch

from aerie.kernels.linear import Linear, _launch_config, _linear_op, linear, linear_ref

CASES = [(1, 1, 1), (3, 100, 63), (5, 63, 100), (70, 40, 65), (0, 16, 16)]  # rows, depth, width
# one rounding to the dtype, plus a sum of D products in another order
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_ref(case, device, dtypes, assert_close):
    rows, depth, width = case
    for dtype in dtypes:
        x = torch.randn(rows, depth, device=device).to(dtype)
        weight = torch.randn(width, depth, device=device).to(dtype)
        bias = torch.randn(width, device=device).to(dtype)
        for b in (None, bias):
            expected = linear_ref(x.float(), weight.float(), None if b is None else b.float())
            assert_close(linear(x, weight, b), expected.to(dtype), TOLERANCE[dtype])


def test_strided_operands(device, assert_close):
    x = torch.randn(4, 90, device=device)[:, 20:70]
    weight = torch.randn(30, 80, device=device)[:, :50]
    assert_close(linear(x, weight), linear_ref(x, weight), TOLERANCE[x.dtype])


def test_sum_is_float32(device, assert_close):
    x = torch.full((1, 4096), 0.25, device=device).half()
    weight = torch.ones(1, 4096, device=device).half()  # a float16 sum would stall at 512
    assert_close(linear(x, weight), torch.full_like(x[:, :1], 1024.0), TOLERANCE[x.dtype])


def test_nan_stays_in_its_row(device):
    x, weight = torch.randn(3, 40, device=device), torch.randn(20, 40, device=device)
    clean = linear(x, weight)
    x[1, 39] = torch.nan
    poisoned = linear(x, weight)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])
    assert poisoned[1].isnan().all()


@pytest.mark.parametrize("bias", [True, False])
def test_module_uses_its_parameters(bias, device, assert_close):
    layer = Linear(24, 40, bias, "triton").to(device)
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 24, device=device)
    assert_close(layer(x), linear_ref(x, layer.weight, layer.bias), TOLERANCE[x.dtype])
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"][: 1 + bias]


def test_opcheck(device):
    x, weight = torch.randn(3, 48, device=device), torch.randn(20, 48, device=device)
    torch.library.opcheck(_linear_op, (x, weight, None))
    torch.library.opcheck(_linear_op, (x, weight, torch.randn(20, device=device)))
    torch.library.opcheck(_linear_op, (torch.randn(3, 96, device=device)[:, 48:], weight, None))


def test_rejects_bad_arguments(device):
    x, weight = torch.randn(2, 16, device=device), torch.randn(8, 16, device=device)
    with pytest.raises(ValueError, match="x_TD: must be float32"):
        linear(x[0], weight)
    with pytest.raises(ValueError, match="x_TD: must be float32"):
        linear(x.double(), weight.double())
    with pytest.raises(ValueError, match="weight_FD: .*contiguous last dimension"):
        linear(x[:, :8], weight.t())
    with pytest.raises(ValueError, match=r"weight_FD: must be torch.float32 \[F, 16\]"):
        linear(x, weight[:, :8])
    with pytest.raises(ValueError, match="weight_FD: must be torch.float32"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"bias_F: must be a contiguous \[8\]"):
        linear(x, weight, torch.randn(7, device=device))


@pytest.mark.parametrize("rows", [1, 16, 17, 8192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_launch_config(rows, itemsize):
    config = _launch_config(rows, itemsize)
    assert min(config.BLOCK_F, config.BLOCK_T, config.BLOCK_D) >= 16  # the smallest tl.dot
    stage = (config.BLOCK_F + config.BLOCK_T) * config.BLOCK_D * itemsize
    assert config.num_stages * stage <= 100 * 1024
