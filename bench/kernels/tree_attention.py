"""Verification attention of Llama 4, 40 query heads on 8 kv heads of 128: the keys and values.

Global layers read the whole prefix, local ones the current chunk of 8192 at most. One sequence,
pages of 16 tokens in shuffled order, random data; a chain up to 5 rows, above that a tree with 4
children each. The context counts the new rows: prefix = context - 64. A CPU gets the two shortest.
`unsplit` is the same kernel with all keys of a tile of rows in one program.

A prompt is a chain of as many rows as one prefill pass has, behind what was committed before.
"""

from dataclasses import replace

import pytest
import torch

from aerie.kernels.tree_attention import TreeRows, tree_attention, tree_attention_ref
from bench.shapes import CHUNK, ON_GPU, ROWS, G, H, K
from bench.timer import Work

PAGE_SIZE, MAX_ROWS, LAST_CHAIN = 16, 64, 5
PROMPT_ROWS = 1024 if ON_GPU else 128
GPU_CONTEXTS = [(1024, None), (8192, CHUNK), (32768, None), (131072, None), (131072, CHUNK)]
CONTEXTS = GPU_CONTEXTS if ON_GPU else [(1024, None), (8192, CHUNK)]


def unsplit(*arguments):
    return tree_attention(*arguments, num_splits=1)


PROVIDERS = {"triton": tree_attention, "eager": tree_attention_ref}
if ON_GPU:  # an interpreted kernel has no time
    PROVIDERS["unsplit"] = unsplit


@pytest.mark.parametrize(("context", "chunk_size"), CONTEXTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_tree_attention(provider, rows, context, chunk_size, measure, device, dtype):
    prefix = context - MAX_ROWS  # all rows stay in the prefix's chunk
    pages = -(-(prefix + rows) // PAGE_SIZE)
    caches = torch.randn(2, pages, PAGE_SIZE, G, K, device=device, dtype=dtype)
    q = torch.randn(rows, H, K, device=device, dtype=dtype)
    step = _step(rows, prefix, pages, device)
    seen = prefix + rows - (prefix // chunk_size * chunk_size if chunk_size else 0)
    moved = 2 * seen * G * K + 2 * q.numel()
    work = Work(bytes=moved * q.element_size(), flops=4 * q.numel() * seen)
    measure(provider, work, PROVIDERS[provider], q, *caches, step, chunk_size, K**-0.5)


@pytest.mark.parametrize(("context", "chunk_size"), CONTEXTS)
@pytest.mark.parametrize("provider", ["triton", "eager"])
def bench_tree_attention_prompt(provider, context, chunk_size, measure, device, dtype):
    prefix, pages = context - PROMPT_ROWS, context // PAGE_SIZE
    caches = torch.randn(2, pages, PAGE_SIZE, G, K, device=device, dtype=dtype)
    q = torch.randn(PROMPT_ROWS, H, K, device=device, dtype=dtype)
    step = _causal_step(PROMPT_ROWS, prefix, pages, device)
    first = prefix // chunk_size * chunk_size if chunk_size else 0  # the chunk holds all rows
    seen = sum(position + 1 - first for position in range(prefix, context))
    moved = 2 * (context - first) * G * K + 2 * q.numel()
    work = Work(bytes=moved * q.element_size(), flops=4 * H * K * seen)
    measure(provider, work, PROVIDERS[provider], q, *caches, step, chunk_size, K**-0.5)


def _step(rows: int, prefix: int, pages: int, device: torch.device) -> TreeRows:
    children = 1 if rows <= LAST_CHAIN else 4
    words, depths = [1], [0]
    for n in range(1, rows):
        parent = (n - 1) // children
        words.append(words[parent] | 1 << n)
        depths.append(depths[parent] + 1)
    signed = [word - 2**64 if word >= 2**63 else word for word in words]
    chain = _causal_step(rows, prefix, pages, device)
    positions_T = prefix + torch.tensor(depths, device=device)
    return replace(chain, positions_T=positions_T, ancestors_T=torch.tensor(signed, device=device))


def _causal_step(rows: int, prefix: int, pages: int, device: torch.device) -> TreeRows:
    return TreeRows(
        positions_T=torch.arange(prefix, prefix + rows, device=device),
        row_starts_B1=torch.tensor([0, rows], dtype=torch.int32, device=device),
        prefix_lengths_B=torch.tensor([prefix], dtype=torch.int32, device=device),
        page_table_BM=torch.randperm(pages, device=device).int()[None],
        ancestors_T=None,
        max_rows=rows,
    )
