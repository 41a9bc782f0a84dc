"""Which targets and drafts a decoding takes, and how often it runs.

What it yields is in tests/test_lossless.py. One target can have several drafts, also at a time, and
every pass of it is told what to tap: a draft that reads another draft's taps raises nothing and is
accepted less.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from aerie.eagle3.decoding import Decoding
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import ChainDrafter
from aerie.eagle3.generate import generate
from aerie.eagle3.interface import SupportsEagle3
from aerie.eagle3.reading import Reading
from aerie.llama4.json_fields import CheckpointError

# few tokens and many prompts, so that a random draft is accepted often enough to tell taps apart
SMALL = {"vocab_size": 8}
PROMPT, COUNT = [1, 2, 3, 4, 5], 4
PROMPTS = [[i % 8, i // 8, 3, 5 * i % 8] for i in range(16)]
TAP_KEY = "eagle_aux_hidden_state_layer_ids"
OTHER_TAPS = {TAP_KEY: [0, 2, 6]}


@pytest.fixture
def target(make_target):
    return make_target(**SMALL)


@pytest.fixture
def make_draft(draft_files, load_draft):
    """`make_draft(target, **changes)`: a random draft over the target's full vocabulary."""

    def make(target, **changes):
        return load_draft(draft_files("llama", **SMALL, draft_vocab_size=None, **changes), target)

    return make


def acceptance(target, draft) -> list[list[int]]:
    """Accepted drafts at each position, for every prompt."""
    return [
        generate(target, prompt, COUNT, draft, 2, eos_token_ids=()).stats.accepted_at
        for prompt in PROMPTS
    ]


def test_target_supports_eagle3(target):
    assert isinstance(target, SupportsEagle3)
    assert not isinstance(nn.Linear(2, 2), SupportsEagle3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eos_token_id": 8}, r"eos_token_id: \[8\] outside the vocabulary 0\.\.7"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id: \[-1\] outside"),
        ({"max_position_embeddings": 1}, "'max_position_embeddings': must be an integer >= 2"),
    ],
    ids=["end token", "negative end token", "no room for a token"],
)
def test_rejects_target_that_no_request_fits(changes, expected, make_target):
    with pytest.raises(CheckpointError, match=expected):
        make_target(**SMALL, **changes)


def test_rejects_draft_of_another_target(target, make_target, make_draft):
    """Even one of the same shapes: the draft reads the embedding it was bound to."""
    draft = make_draft(make_target(**SMALL))
    with pytest.raises(ValueError, match="draft: was loaded for another target"):
        Decoding(target, PROMPT, COUNT, draft)
    with pytest.raises(ValueError, match="draft: was loaded for another target"):
        generate(target, PROMPT, COUNT, draft)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_draft_hold_what_is_its_own_and_can_be_bound(copied, target, make_draft):
    draft = make_draft(target)
    twin = copied(draft)
    assert "embed_tokens" not in vars(twin)  # the target's would be as large as the draft
    with pytest.raises(ValueError, match=r"or is a copy; .* call draft\.bind\(target\)"):
        generate(target, PROMPT, COUNT, twin)
    twin.bind(target)
    assert acceptance(target, twin) == acceptance(target, draft)


def test_rejects_a_pair_of_which_one_was_moved(make_target, make_draft):
    target = make_target(**SMALL)
    draft = make_draft(target)
    target.to(torch.float64)
    with pytest.raises(ValueError, match="is torch.float32 on cpu, the target torch.float64"):
        generate(target, PROMPT, COUNT, draft)
    draft.to(torch.float64)
    draft.bind(target)
    assert len(generate(target, PROMPT, COUNT, draft, eos_token_ids=()).tokens) == COUNT


def test_rejects_a_pair_whose_cut_head_was_left_behind(make_target, draft_files, tmp_path):
    target, reading = make_target(), Reading(lm_head="target")
    folder = draft_files("llama").write(tmp_path / "draft")
    draft = Eagle3Llama4ForCausalLM.from_pretrained(folder, target, reading=reading)
    target.to(torch.float64)
    draft.to(torch.float64)
    with pytest.raises(ValueError, match=r"is torch.float32 .*call draft\.bind\(target\)"):
        generate(target, PROMPT, COUNT, draft)
    draft.bind(target)
    assert len(generate(target, PROMPT, COUNT, draft, eos_token_ids=()).tokens) == COUNT


def test_prompts_as_rows_of_an_array(target):
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    for rows in (ids, ids.numpy()):
        results = generate(target, rows, COUNT)
        expected = generate(target, [PROMPT, PROMPT[::-1]], COUNT)
        assert [result.tokens for result in results] == [result.tokens for result in expected]


def test_draft_keeps_its_taps_when_another_is_loaded(target, make_draft):
    draft = make_draft(target)
    before = acceptance(target, draft)
    other = make_draft(target, **OTHER_TAPS)
    assert acceptance(target, draft) == before
    of_other = acceptance(target, other)
    assert acceptance(target, draft) == before
    assert acceptance(target, other) == of_other


def test_threads_share_a_target(target, make_draft):
    """A thread whose draft taps elsewhere changes nothing for this one."""
    drafts = [make_draft(target), make_draft(target, **OTHER_TAPS)]
    alone = [acceptance(target, draft) for draft in drafts]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(len(drafts)) as pool:
        together = pool.map(lambda draft: [acceptance(target, draft) for _ in range(3)], drafts)
    assert [set(map(str, runs)) for runs in together] == [{str(one)} for one in alone]


def test_taps_of_another_draft_would_show(target, make_draft):
    """The control of the test above: with the other draft's taps the acceptance is another."""
    draft = make_draft(target)
    right = acceptance(target, draft)
    taps = make_draft(target, **OTHER_TAPS).tap_layers(target)
    wrong = []
    for prompt in PROMPTS:
        cache = draft.allocate_cache(len(prompt) + COUNT + 3, num_pages=1)
        drafter = ChainDrafter(2, draft, cache, taps)
        decoding = Decoding(target, prompt, COUNT, None, 2, (), drafter)
        list(decoding)
        wrong.append(decoding.stats.accepted_at)
    assert wrong != right


@pytest.mark.parametrize("num_bursts", [1, 2, None], ids=["first", "second", "all"])
def test_is_iterated_once(num_bursts, target, make_draft):
    decoding = Decoding(target, PROMPT, 12, make_draft(target), eos_token_ids=())
    first = iter(decoding)
    bursts = list(first) if num_bursts is None else [next(first) for _ in range(num_bursts)]
    with pytest.raises(ValueError, match="a Decoding is iterated once"):
        next(iter(decoding))
    bursts += list(first)  # the one that runs is not disturbed
    tokens = [token for burst in bursts for token in burst]
    assert tokens == generate(target, PROMPT, 12, eos_token_ids=()).tokens
