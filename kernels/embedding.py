"""Row gather: token embeddings, or chosen rows of a hidden state.

    y[t] = weight[ids[t]]

Nothing is computed, so the result is exact in every dtype. An id outside [0, V) cannot be reported
without waiting for the GPU: the kernel then reads nothing and fills that row with NaN, while the
reference raises IndexError as PyTorch does.

Letters: T rows, V rows of the table, D width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from aerie.kernels.backend import ResolvedBackend, check_dtype, check_launchable, pick
from aerie.kernels.module import Module


def embedding_ref(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    """The gather in PyTorch; raises IndexError on an id outside [0, V)."""
    return weight_VD.index_select(0, ids_T)


@triton.jit(do_not_specialize=["V"])
def _embedding_kernel(
    ids_ptr,  # [T]
    weight_ptr,  # [V, D]
    y_ptr,  # [T, D]
    stride_wv,
    V,
    D,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(ids_ptr + t)
    readable = d < tl.where((row >= 0) & (row < V), D, 0)
    x = tl.load(weight_ptr + row * stride_wv + d, mask=readable, other=0.0)
    y = tl.where(readable, x.to(tl.float32), float("nan"))
    tl.store(y_ptr + t * D + d, y, mask=d < D)


@dataclass(frozen=True)
class LaunchConfig:
    """One program copies `BLOCK_D` columns of one row."""

    BLOCK_D: int
    num_warps: int


def _launch_config(width: int) -> LaunchConfig:
    """Eight elements per thread, at most four warps. Chosen by shape; not yet measured on a GPU."""
    block = min(1024, triton.next_power_of_2(width))
    return LaunchConfig(BLOCK_D=block, num_warps=max(1, block // 256))


@torch.library.custom_op("aerie::embedding", mutates_args=())
def _embedding_op(ids: Tensor, weight: Tensor) -> Tensor:
    check_launchable(weight)
    rows, width = ids.shape[0], weight.shape[1]
    y_TD = weight.new_empty(rows, width)
    config = _launch_config(width)
    if y_TD.numel() > 0:
        _embedding_kernel[(rows, triton.cdiv(width, config.BLOCK_D))](
            ids,
            weight,
            y_TD,
            weight.stride(0),
            weight.shape[0],
            width,
            BLOCK_D=config.BLOCK_D,
            num_warps=config.num_warps,
        )
    return y_TD


@_embedding_op.register_fake
def _(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    """Rows `ids_T` (int64) of `weight_VD`; returns [T, D]. An id outside [0, V) gives a row of NaN.

    Raises ValueError on a shape, dtype or layout the kernel would read wrongly.
    """
    if ids_T.ndim != 1 or ids_T.dtype != torch.int64 or not ids_T.is_contiguous():
        raise ValueError(
            f"ids_T: must be a contiguous int64 [T], got {ids_T.dtype} {tuple(ids_T.shape)}"
        )
    if weight_VD.dtype != torch.float8_e4m3fn:  # its rows are moved, too
        check_dtype("weight_VD", weight_VD)
    if weight_VD.ndim != 2 or weight_VD.stride(-1) != 1:
        raise ValueError(
            f"weight_VD: must be [V, D] with a contiguous last dimension, "
            f"got {weight_VD.dtype} {tuple(weight_VD.shape)} strides {weight_VD.stride()}"
        )
    return _embedding_op(ids_T, weight_VD)


class Embedding(Module):
    """A table of `num_rows` vectors, named as in Hugging Face checkpoints (`weight`)."""

    def __init__(self, num_rows: int, width: int, backend: ResolvedBackend) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width), requires_grad=False)
        self._embedding = pick(backend, embedding, embedding_ref)

    def forward(self, ids_T: Tensor) -> Tensor:
        return self._embedding(ids_T, self._parameters["weight"])
