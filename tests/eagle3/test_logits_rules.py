"""Rules as rows of tables: rows are independent, tables grow, and ranks judge their own columns.

Regimes: chains and trees of several sequences with rules of their own beside one without; the same
rows one by one; a vocabulary cut over three ranks, whose columns put together are the whole; tables
that grow under rows that have joined; rows that move. What the rules say is compared with
transformers' in tests/test_sampled_lossless.py.
"""

import random
from dataclasses import replace

import pytest
import torch

from aerie.eagle3.choice_form import ChoiceForm, RuleForm, common_form
from aerie.eagle3.logits_rules import RuleColumns
from aerie.eagle3.prefixes import Prefixes
from aerie.eagle3.sampling import SamplingParams
from aerie.llama4.device_steps import chain_shape, device_shape
from aerie.llama4.step import Tree

CPU, VOCAB, KNOWN = torch.device("cpu"), 23, 9
PARAMS = [
    SamplingParams(),
    SamplingParams(bad_words_ids=[[3], [1, 2], [4, 5, 6], [7] * 5], repetition_penalty=1.7),
    SamplingParams(min_tokens=7, stop_token_ids=[2, 22], logit_bias={0: 2, 21: -3}),
    SamplingParams(presence_penalty=0.7, frequency_penalty=-0.4, repetition_penalty=0.8),
]
SHAPES = {
    "root": chain_shape(1, CPU),
    "chain": chain_shape(4, CPU),
    "tree": device_shape(Tree((-1, 0, 0, 1, 1, 2, 3)), CPU),
}


def columns_of(params, own_ids=range(VOCAB)) -> RuleColumns:
    rules = RuleColumns(len(params), own_ids, CPU)
    for row, own in enumerate(params):
        rules.join(row, own, [1], 5)
    return rules


def form_of(params) -> RuleForm:
    return common_form(ChoiceForm.of(own, [1]) for own in params).rules


def rows(shape: str, count: int) -> tuple[torch.Tensor, Prefixes]:
    """Logits and prefixes of few tokens, so that words begin and ids repeat."""
    choose = random.Random(shape)
    tree = SHAPES[shape]
    num_rows = len(tree.parents_N)

    def ids(*sizes: int) -> torch.Tensor:
        numbers = [choose.choice([1, 2, 3, 4, 5, 7, 22]) for _ in range(sizes[0] * sizes[1])]
        return torch.tensor(numbers).view(sizes)

    torch.manual_seed(0)
    known_B = torch.tensor([KNOWN - b for b in range(count)])
    prompts_B = torch.full((count,), 5)
    words_N = tree.words_N
    prefixes = Prefixes(
        ids(count, KNOWN + 4), known_B, prompts_B, ids(count, num_rows),
        tree.parents_N.expand(count, -1), tree.depths_N.expand(count, -1),
        None if words_N is None else words_N.expand(count, -1),
    )  # fmt: skip
    return torch.randn(count, num_rows, VOCAB), prefixes


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequence_is_judged_as_it_is_alone(shape):
    logits_BNV, prefixes = rows(shape, len(PARAMS))
    together = columns_of(PARAMS).judged(logits_BNV, prefixes, 0, form_of(PARAMS))
    assert torch.equal(together[0], logits_BNV[0])  # asks for nothing
    for b, own in enumerate(PARAMS):
        one = slice(b, b + 1)
        alone = columns_of([own]).judged(logits_BNV[one], prefixes.of(b), 0, form_of([own]))
        assert torch.equal(together[one], alone)
        assert b == 0 or not torch.equal(alone, logits_BNV[one])
        behind = columns_of(PARAMS).judged(logits_BNV[one], prefixes.of(b), b, form_of([own]))
        assert torch.equal(behind, alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_judge_their_own_columns(shape):
    logits_BNV, prefixes = rows(shape, len(PARAMS))
    form = form_of(PARAMS)
    whole = columns_of(PARAMS).judged(logits_BNV, prefixes, 0, form)
    parts = [
        columns_of(PARAMS, own).judged(logits_BNV[:, :, own.start : own.stop], prefixes, 0, form)
        for own in (range(8), range(8, 16), range(16, VOCAB))
    ]
    assert torch.equal(torch.cat(parts, dim=2), whole)


def test_tables_grow_under_the_rows_that_have_joined():
    logits_BNV, prefixes = rows("chain", 4)
    small = [PARAMS[1], PARAMS[2], PARAMS[0], PARAMS[0]]
    grown = RuleColumns(4, range(VOCAB), CPU)
    for row, own in enumerate(small):
        grown.join(row, own, [1], 5)
    before = grown.form
    grown.reserve(replace(before, num_words=9, longest_beginning=7, num_ends=12))
    assert grown.form != before
    form = form_of(small)
    found = grown.judged(logits_BNV, prefixes, 0, form)
    assert torch.equal(found, columns_of(small).judged(logits_BNV, prefixes, 0, form))
    columns = grown.columns
    grown.reserve(before)
    assert all(x is y for x, y in zip(columns, grown.columns, strict=True))


def test_a_row_moves_whole_and_forgets_what_it_was():
    logits_BNV, prefixes = rows("tree", 4)
    rules, form = columns_of(PARAMS), form_of(PARAMS)
    rules.move(3, 0)
    rules.join(3, SamplingParams(), [1], 5)
    found = rules.judged(logits_BNV, prefixes, 0, form)
    expected = columns_of([PARAMS[3], PARAMS[1], PARAMS[2], PARAMS[0]])
    assert torch.equal(found, expected.judged(logits_BNV, prefixes, 0, form))
    assert torch.equal(found[3], logits_BNV[3])
