"""Acceptance: walk down each drafted tree along the target's own choices, greedy or drawn.

    from the root, at every row n:  c = the child of n whose token is target_ids[n]
                                    if there is one, accept it and go on from c; else stop
    bonus = target_ids of the row where the walk stops

Row 0 of a sequence is its root, the last committed token that was not verified yet; the others are
drafted nodes, parents before children. The target ids are the target's own choices given each row's
prefix: its argmax, or its draw with the noise of that position (`draw`). So the text is what plain
decoding gives, and the tree only decides how much of it one pass yields. Among children with one
token the lowest row wins. A negative target id (a row that is no distribution, see `argmax` and
`draw`) matches nothing, ends the walk and comes back as the bonus. A walk also ends when the path
is full. A sequence without rows gets an empty path, no accepted nodes and the bonus -1.

Letters: B sequences, T rows, P path length.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from aerie.kernels.backend import check_launchable

MAX_ROWS = 64  # per sequence: one ancestor word (see `tree_attention`)


@dataclass(frozen=True)
class Acceptance:
    """What the target accepted of every sequence's tree."""

    path_BP: Tensor  # int64, rows within the sequence: root, accepted nodes, then -1
    ids_BP: Tensor  # int64, target id of each of these rows: accepted tokens, bonus, then -1
    num_accepted_B: Tensor  # int64, drafted nodes accepted (the root is not counted)
    bonus_B: Tensor  # int64, the target's token after the last accepted row


def accept_ref(
    tokens_T: Tensor, parents_T: Tensor, target_ids_T: Tensor, row_starts_B1: Tensor, max_path: int
) -> Acceptance:
    """The walk above on Python lists: a handful of integers is quicker there than in any tensor."""
    tokens, parents, target_ids = tokens_T.tolist(), parents_T.tolist(), target_ids_T.tolist()
    starts = row_starts_B1.tolist()
    walks = [
        _walk(tokens[start:stop], parents[start:stop], target_ids[start:stop], max_path)
        for start, stop in zip(starts, starts[1:], strict=False)
    ]
    columns = [
        [
            *_padded(path, max_path),
            *_padded(ids, max_path),
            max(len(path) - 1, 0),
            (ids or [-1])[-1],
        ]
        for path, ids in walks
    ]
    result = torch.tensor(columns, dtype=torch.int64, device=tokens_T.device)
    result = result.view(len(walks), 2 * max_path + 2)
    path_BP, ids_BP, last_B2 = result.split_with_sizes((max_path, max_path, 2), dim=1)
    return Acceptance(path_BP, ids_BP, last_B2[:, 0], last_B2[:, 1])


def _padded(numbers: list[int], length: int) -> list[int]:
    return numbers + [-1] * (length - len(numbers))


def _walk(tokens: list[int], parents: list[int], target_ids: list[int], max_path: int):
    if not tokens:
        return [], []
    path = [0]
    for row in range(1, len(tokens)):  # one pass is enough: parents precede children
        target = target_ids[path[-1]]
        if (
            len(path) < max_path
            and target >= 0
            and (parents[row], tokens[row]) == (path[-1], target)
        ):
            path.append(row)
    return path, [target_ids[row] for row in path]


@triton.jit(do_not_specialize=["P"])
def _accept_kernel(
    tokens_ptr,  # [T]
    parents_ptr,  # [T]
    target_ids_ptr,  # [T]
    row_starts_ptr,  # [B + 1]
    path_ptr,  # [B, P], filled with -1
    ids_ptr,  # [B, P], filled with -1
    num_accepted_ptr,  # [B]
    bonus_ptr,  # [B]
    P,
    BLOCK_N: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(row_starts_ptr + b).to(tl.int64)
    num_rows = tl.load(row_starts_ptr + b + 1).to(tl.int64) - start
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    in_tree = n < num_rows
    tokens = tl.load(tokens_ptr + start + n, mask=in_tree, other=-1)
    parents = tl.load(parents_ptr + start + n, mask=in_tree, other=-1)
    has_root = num_rows > 0
    tl.store(path_ptr + b * P, tl.zeros([], tl.int64), mask=has_root)
    row = tl.zeros([], tl.int64)
    num_accepted = tl.zeros([], tl.int64)
    target = tl.load(target_ids_ptr + start, mask=has_root, other=-1)
    tl.store(ids_ptr + b * P, target, mask=has_root)
    for p in range(1, P):
        is_match = in_tree & (n > 0) & (parents == row) & (tokens == target) & (target >= 0)
        child = tl.min(tl.where(is_match, n, BLOCK_N), axis=0)
        # once a walk has stopped, the same row finds no child again, so it stays stopped
        found = child < BLOCK_N
        row = tl.where(found, child, row)
        num_accepted += found.to(tl.int64)
        target = tl.load(target_ids_ptr + start + row, mask=has_root, other=-1)
        tl.store(path_ptr + b * P + p, row, mask=found)
        tl.store(ids_ptr + b * P + p, target, mask=found)
    tl.store(num_accepted_ptr + b, num_accepted)
    tl.store(bonus_ptr + b, target)


@dataclass(frozen=True)
class LaunchConfig:
    """One sequence per program, its whole tree in one tile."""

    BLOCK_N: int
    num_warps: int


def _launch_config() -> LaunchConfig:
    """A tree of `MAX_ROWS` rows is two per thread of a warp. Not yet measured on a GPU."""
    return LaunchConfig(BLOCK_N=MAX_ROWS, num_warps=1)


@torch.library.custom_op("aerie::accept", mutates_args=())
def _accept_op(
    tokens: Tensor, parents: Tensor, target_ids: Tensor, row_starts: Tensor, max_path: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_launchable(tokens)
    sequences = row_starts.numel() - 1
    path, ids = (tokens.new_full((sequences, max_path), -1) for _ in range(2))
    num_accepted, bonus = tokens.new_empty(sequences), tokens.new_empty(sequences)
    config = _launch_config()
    if sequences > 0:
        _accept_kernel[(sequences,)](
            tokens,
            parents,
            target_ids,
            row_starts,
            path,
            ids,
            num_accepted,
            bonus,
            max_path,
            BLOCK_N=config.BLOCK_N,
            num_warps=config.num_warps,
        )
    return path, ids, num_accepted, bonus


@_accept_op.register_fake
def _(
    tokens: Tensor, parents: Tensor, target_ids: Tensor, row_starts: Tensor, max_path: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = row_starts.numel() - 1
    shapes = (*[(sequences, max_path)] * 2, (sequences,), (sequences,))
    path, ids, num_accepted, bonus = (tokens.new_empty(shape) for shape in shapes)
    return path, ids, num_accepted, bonus


def accept(
    tokens_T: Tensor, parents_T: Tensor, target_ids_T: Tensor, row_starts_B1: Tensor, max_path: int
) -> Acceptance:
    """Walk of every sequence's tree; `parents_T` counts rows within the sequence (root: -1).

    `max_path` should be at least the tree's depth + 1. A sequence has at most `MAX_ROWS` rows.
    Raises ValueError on a shape or dtype the kernel would read wrongly.
    """
    rows = tokens_T.shape[0]
    tree = {"tokens_T": tokens_T, "parents_T": parents_T, "target_ids_T": target_ids_T}
    for name, x in tree.items():
        if x.shape != (rows,) or x.dtype != torch.int64 or not x.is_contiguous():
            raise ValueError(
                f"{name}: must be a contiguous int64 [{rows}], got {tuple(x.shape)} {x.dtype}"
            )
    is_integer = not row_starts_B1.is_floating_point()
    is_list = row_starts_B1.ndim == 1 and row_starts_B1.is_contiguous() and row_starts_B1.numel()
    if not is_integer or not is_list:
        raise ValueError(
            f"row_starts_B1: must be a contiguous integer [B + 1], "
            f"got {tuple(row_starts_B1.shape)} {row_starts_B1.stride()} {row_starts_B1.dtype}"
        )
    if rows > MAX_ROWS * (row_starts_B1.numel() - 1):
        raise ValueError(
            f"tokens_T: at most {MAX_ROWS} rows per sequence, "
            f"got {rows} rows for {row_starts_B1.numel() - 1} sequences"
        )
    if max_path < 1:
        raise ValueError(f"max_path: must be at least 1, got {max_path}")
    return Acceptance(*_accept_op(tokens_T, parents_T, target_ids_T, row_starts_B1, max_path))
