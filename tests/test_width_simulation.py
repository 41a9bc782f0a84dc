"""Cost-aware width in the simulation of `bench.width`: never much below the best fixed chain, and
above every fixed chain where one choice has to serve all. The traces are what the script records.
"""

import json

import pytest

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.embedded import DRAFT, HELDOUT_PROMPTS, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer
from bench.traces import PATH, record
from bench.width import MAVERICK, MIX, SCOUT, compared, main, on_the_mix

STEP_MS = {  # kernels.md's tables of a step without context: all FP8, bf16 head
    SCOUT: {1: 3.99, 4: 7.70, 8: 11.7, 16: 17.1, 32: 22.2, 64: 24.7},
    MAVERICK: {1: 0.50, 4: 0.76, 8: 1.10, 16: 1.74, 32: 2.91, 64: 4.85},
}


@pytest.mark.parametrize("scenario", MIX, ids=str)
def test_never_far_below_the_best_fixed_chain(scenario):
    assert compared(scenario).over_best >= 0.98


def test_above_every_fixed_chain_on_the_mix():
    mix = on_the_mix(MIX)
    assert mix.cost_aware > 1.1 * max(mix.fixed)
    best = {result.fixed.index(max(result.fixed)) for result in map(compared, MIX)}
    assert len(best) >= 4  # the scenarios do want different chains


@pytest.mark.parametrize("target", STEP_MS, ids=lambda target: target.name)
def test_rooflines_are_those_of_the_tables(target):
    for rows, ms in STEP_MS[target].items():
        assert target.verify_ms(rows, 0) - target.fixed_ms == pytest.approx(ms, rel=0.01)


def test_the_table_says_that_it_is_simulated(capsys):
    main()
    assert capsys.readouterr().out.startswith("SIMULATED")


def test_traces_are_what_the_script_records():
    saved = json.loads(PATH.read_text().splitlines()[0])
    target = Llama4ForCausalLM.from_pretrained(TARGET)
    draft = Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, target)
    text = json.loads(HELDOUT_PROMPTS.read_text())["prompts"][saved["prompt"]]["text"]
    again = record(target, draft, load_tokenizer(TARGET).encode(text).ids, 0.0, seed=0)
    assert again["accepted"] == saved["accepted"]
    for mine, theirs in zip(again["scores"], saved["scores"], strict=True):
        assert mine == pytest.approx(theirs, abs=1)  # a hundredth of a nat
