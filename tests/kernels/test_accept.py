"""Greedy acceptance against its reference and against a recursive statement of the rule.

Regimes: chains accepted fully, partly, not at all; random trees up to 64 rows in ragged batches;
siblings with one token; a token that is right but below the wrong parent; a NaN row (negative
target id); the root alone; a sequence without rows; a full path; garbage in rows past the last; no
sequences; int32 and int64 row starts; writes outside the outputs, unequal runs; bad arguments.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aerie.kernels.accept import MAX_ROWS, _accept_op, _launch_config, accept, accept_ref
from tests.evidence import check_compiles, edges, few_examples, on_gpu, run_guarded, same_bits


def _walk(tokens, parents, target_ids):
    """The rule of `accept` as a recursion: the accepted rows and the bonus."""

    def step(row):
        children = [n for n in range(len(tokens)) if parents[n] == row]
        matching = [n for n in children if target_ids[row] >= 0 and tokens[n] == target_ids[row]]
        if not matching:
            return [row], target_ids[row]
        path, bonus = step(min(matching))
        return [row, *path], bonus

    return step(0)


def _accept_both(trees, max_path, device, runs=1):
    """Runs op and ref on (tokens, parents, target_ids) per sequence; they must agree exactly."""
    lengths = [len(tokens) for tokens, _, _ in trees]
    columns = [[x for tree in trees for x in tree[i]] for i in range(3)]
    flat = [torch.tensor(column, dtype=torch.int64, device=device) for column in columns]
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0).int()
    actual = run_guarded(accept, *flat, starts, max_path, runs=runs)
    expected = accept_ref(*flat, starts, max_path)
    for name in ("path_BP", "ids_BP", "num_accepted_B", "bonus_B"):
        assert same_bits(getattr(actual, name), getattr(expected, name)), name
        assert getattr(actual, name).dtype == torch.int64
    return actual


def _random_tree(rows):
    parents = [-1, *[int(torch.randint(n, ())) for n in range(1, rows)]]
    tokens, target_ids = (torch.randint(3, (rows,)).tolist() for _ in range(2))
    return tokens, parents, target_ids


@pytest.mark.parametrize("seed", range(2))
def test_random_trees(seed, device):
    torch.manual_seed(seed)
    trees = [_random_tree(rows) for rows in (1, 2, 7, MAX_ROWS, 33)]
    acceptance = _accept_both(trees, MAX_ROWS, device)
    for b, tree in enumerate(trees):
        path, bonus = _walk(*tree)
        assert acceptance.path_BP[b].tolist() == path + [-1] * (MAX_ROWS - len(path))
        assert acceptance.num_accepted_B[b] == len(path) - 1
        assert acceptance.bonus_B[b] == bonus
        ids = [tree[0][row] for row in path[1:]] + [bonus]
        assert acceptance.ids_BP[b].tolist() == ids + [-1] * (MAX_ROWS - len(ids))


@few_examples
@given(st.lists(edges(MAX_ROWS, MAX_ROWS), min_size=1, max_size=2), st.integers(1, 4))
def test_any_ragged_batch(device, lengths, max_path):
    torch.manual_seed(sum(lengths))
    _accept_both([_random_tree(rows) for rows in lengths], max_path, device)


@pytest.mark.parametrize("sequences", [1, *on_gpu(512)])
def test_full_trees(sequences, device):
    trees = [_random_tree(MAX_ROWS) for _ in range(sequences)]
    acceptance = _accept_both(trees, 9, device, runs=2)
    assert acceptance.path_BP.shape == (sequences, 9)


@pytest.mark.parametrize("accepted", range(5))
def test_chain(accepted, device):
    target_ids = [11, 12, 13, 14, 15]
    tokens = [10, *[t if i < accepted else 99 for i, t in enumerate(target_ids[:4])]]
    acceptance = _accept_both([(tokens, [-1, 0, 1, 2, 3], target_ids)], 5, device)
    assert acceptance.num_accepted_B.tolist() == [accepted]
    assert acceptance.bonus_B.tolist() == [target_ids[accepted]]
    assert acceptance.path_BP[0, : accepted + 1].tolist() == list(range(accepted + 1))


def test_lowest_of_equal_siblings_wins(device):
    tokens, parents = [5, 7, 7, 8, 9], [-1, 0, 0, 2, 1]
    acceptance = _accept_both([(tokens, parents, [7, 9, 8, 1, 2])], 4, device)
    assert acceptance.path_BP.tolist() == [[0, 1, 4, -1]]


def test_token_below_another_parent_is_not_taken(device):
    tokens, parents = [5, 6, 7], [-1, 0, 1]
    acceptance = _accept_both([(tokens, parents, [7, 7, 7])], 3, device)
    assert acceptance.path_BP.tolist() == [[0, -1, -1]]
    assert acceptance.bonus_B.tolist() == [7]


def test_nan_row_stops_its_walk_and_no_other(device):
    chain = ([5, 6, -1, 8], [-1, 0, 1, 2], [6, -1, 8, 9])
    acceptance = _accept_both([chain, ([5, 6], [-1, 0], [6, 4])], 4, device)
    assert acceptance.num_accepted_B.tolist() == [1, 1]
    assert acceptance.bonus_B.tolist() == [-1, 4]


def test_sequence_without_rows(device):
    acceptance = _accept_both([([], [], []), ([5], [-1], [6]), ([], [], [])], 2, device)
    assert acceptance.path_BP.tolist() == [[-1, -1], [0, -1], [-1, -1]]
    assert acceptance.num_accepted_B.tolist() == [0, 0, 0]
    assert acceptance.bonus_B.tolist() == [-1, 6, -1]


def test_full_path_ends_the_walk(device):
    chain = ([5, 6, 7, 8], [-1, 0, 1, 2], [6, 7, 8, 9])
    for max_path in (1, 2, 3):
        acceptance = _accept_both([chain], max_path, device)
        assert acceptance.num_accepted_B.tolist() == [max_path - 1]
        assert acceptance.bonus_B.tolist() == [5 + max_path]


def test_rows_past_the_last_are_not_read(device):
    tokens, parents = torch.tensor([[5, 6, 6], [-1, 0, 1]], device=device)
    target_ids = torch.tensor([6, 6, 2**62], device=device)
    starts = torch.tensor([0, 2], dtype=torch.int32, device=device)
    acceptance = accept(tokens, parents, target_ids, starts, 3)
    assert acceptance.path_BP.tolist() == [[0, 1, -1]]
    assert acceptance.bonus_B.tolist() == [6]


def test_row_starts_of_either_width(device):
    tokens, parents = torch.tensor([[5, 6, 7], [-1, 0, 0]], device=device)
    starts = torch.tensor([0, 3], device=device)
    for by_width in (
        accept(tokens, parents, tokens + 1, starts.to(d), 2) for d in (None, torch.int32)
    ):
        assert by_width.path_BP.tolist() == [[0, 1]]


def test_no_sequences(device):
    assert _accept_both([], 4, device).path_BP.shape == (0, 4)


def test_opcheck(device):
    tokens, parents = torch.tensor([[5, 6, 7], [-1, 0, 1]], device=device)
    starts = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    torch.library.opcheck(_accept_op, (tokens, parents, tokens + 1, starts, 3))


def test_compiles_once_for_all_row_counts(device):
    starts = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    rows = torch.arange(4, device=device)
    check_compiles(
        accept,
        *(rows[:3], rows[:3] - 1, rows[:3] + 1, starts, 4),
        again=(rows, rows - 1, rows + 1, starts + 1, 4),
    )


def test_rejects_bad_arguments(device):
    tokens = torch.zeros(3, dtype=torch.int64, device=device)
    starts = torch.tensor([0, 3], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"parents_T: must be a contiguous int64 \[3\]"):
        accept(tokens, tokens[:2], tokens, starts, 3)
    with pytest.raises(ValueError, match="target_ids_T: must be"):
        accept(tokens, tokens, tokens.int(), starts, 3)
    with pytest.raises(ValueError, match=r"parents_T: must be a contiguous int64 \[3\]"):
        accept(tokens, tokens.repeat(2)[::2], tokens, starts, 3)
    with pytest.raises(ValueError, match="target_ids_T: must be a contiguous int64"):
        accept(tokens, tokens, tokens[:1].expand(3), starts, 3)
    with pytest.raises(ValueError, match="row_starts_B1: must be a contiguous integer"):
        accept(tokens, tokens, tokens, starts.float(), 3)
    with pytest.raises(ValueError, match="max_path: must be at least 1"):
        accept(tokens, tokens, tokens, starts, 0)
    many = torch.zeros(MAX_ROWS + 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=f"at most {MAX_ROWS} rows per sequence"):
        accept(many, many, many, starts, 3)


def test_rejects_strided_row_starts(device):
    tokens = torch.zeros(2, dtype=torch.int64, device=device)
    starts = torch.tensor([0, 9, 2], dtype=torch.int32, device=device)[::2]
    with pytest.raises(ValueError, match="row_starts_B1: must be a contiguous"):
        accept(tokens, tokens, tokens, starts, 2)


def test_launch_config():
    assert _launch_config().BLOCK_N == MAX_ROWS
