"""Verification attention of Llama 4, 40 query heads on 8 kv heads of 128: the keys and values.

Global layers read the whole prefix, local ones the current chunk of 8192 at most. One sequence,
pages of 16 tokens in shuffled order, a chain or a tree of 64 nodes with 4 children each.
"""

import pytest
import torch

from aerie.kernels.tree_attention import TreeRows, tree_attention, tree_attention_ref
from bench.timer import Work

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, CHUNK = 40, 8, 128, 16, 8192
PROVIDERS = {"triton": tree_attention, "eager": tree_attention_ref}


@pytest.mark.parametrize("chunk_size", [None, CHUNK], ids=["global", "local"])
@pytest.mark.parametrize("prefix", [1024, 8000, 32000])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_tree_attention(provider, rows, prefix, chunk_size, measure, device, dtype):
    pages = -(-(prefix + rows) // PAGE_SIZE)
    caches = torch.randn(2, pages, PAGE_SIZE, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    q = torch.randn(rows, HEADS, HEAD_DIM, device=device, dtype=dtype)
    step = _step(rows, prefix, pages, device)
    seen = prefix + rows - (prefix // chunk_size * chunk_size if chunk_size else 0)
    moved = 2 * seen * KV_HEADS * HEAD_DIM + 2 * q.numel()
    work = Work(bytes=moved * q.element_size(), flops=4 * q.numel() * seen)
    scale = HEAD_DIM**-0.5
    measure(provider, work, PROVIDERS[provider], q, *caches, step, chunk_size, scale)


def _step(rows: int, prefix: int, pages: int, device: torch.device) -> TreeRows:
    parents = [(n - 1) // (4 if rows > 5 else 1) for n in range(rows)]
    words, depths = [1], [0]
    for n in range(1, rows):
        words.append(words[parents[n]] | 1 << n)
        depths.append(depths[parents[n]] + 1)
    signed = [word - 2**64 if word >= 2**63 else word for word in words]
    return TreeRows(
        positions_T=prefix + torch.tensor(depths, device=device),
        row_starts_B1=torch.tensor([0, rows], dtype=torch.int32, device=device),
        prefix_lengths_B=torch.tensor([prefix], dtype=torch.int32, device=device),
        page_table_BM=torch.randperm(pages, device=device).int()[None],
        ancestors_T=torch.tensor(signed, device=device),
        max_rows=rows,
    )
