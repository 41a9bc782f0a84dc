"""`python -m bench.traces`: records what the embedded draft proposes at every position of a text.

The target decodes held-out prompts alone, greedy and at temperature 1; before each of its tokens
the draft proposes a chain, which is written down and not verified. So a policy of any width can be
replayed from any round's start (`bench.width`). One JSON line per prompt and temperature:

    {"temperature": 0.0, "prompt": 3, "scores": [[...], ...], "accepted": [...]}

`scores`: hundredths of a nat, the draft's log-probability of the chain down to each level;
`accepted`: how many of the chain's tokens the target did write.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from aerie.eagle3.batch import Committed
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import ChainDrafter
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.tree import DraftTree, chain
from aerie.embedded import DRAFT, HELDOUT_PROMPTS, TARGET
from aerie.llama4.kv_plan import PAGE_SIZE
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer

PATH = Path(__file__).parent / "results" / "acceptance_traces.jsonl"
DEPTH, NUM_TOKENS, NUM_PROMPTS, TEMPERATURES = 8, 72, 16, (0.0, 1.0)


@dataclass(frozen=True)
class Start:
    """One recorded position: log-probabilities of the chain down to each level, and its truth."""

    scores: tuple[float, ...]
    accepted: int


@cache
def read_traces(temperature: float) -> list[Start]:
    """All recorded positions of a temperature, prompt after prompt."""
    starts = []
    for line in PATH.read_text().splitlines():
        trace = json.loads(line)
        if trace["temperature"] == temperature:
            pairs = zip(trace["scores"], trace["accepted"], strict=True)
            starts += [Start(tuple(x / 100 for x in scores), n) for scores, n in pairs]
    return starts


class Recorder(ChainDrafter):
    """Proposes nothing, and remembers what it would have proposed."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seen: list[DraftTree] = []

    def propose(self, committed: Committed) -> DraftTree:
        proposed = super().propose(committed)
        self.seen.append(proposed)
        return chain(proposed.tokens_BN[:, :0])


def record(target, draft, prompt_ids: list[int], temperature: float, seed: int) -> dict[str, list]:
    """Chains from all positions that have `DEPTH` tokens of the target's behind them."""
    slots = len(prompt_ids) + NUM_TOKENS + DEPTH + 1
    cache = draft.allocate_cache(slots, num_pages=-(-slots // PAGE_SIZE))
    recorder = Recorder(DEPTH, draft, cache, draft.tap_layers(target))
    params = SamplingParams(temperature, seed=seed)
    text = Decoding(target, prompt_ids, NUM_TOKENS, None, DEPTH, (), recorder, sampling=params)
    list(text)
    scores, accepted = [], []
    for at, tree in enumerate(recorder.seen[: NUM_TOKENS - DEPTH], start=1):
        assert tree.scores_BN is not None
        pairs = zip(tree.tokens_BN[0].tolist(), text.tokens[at : at + DEPTH], strict=True)
        is_hit = [drafted == written for drafted, written in pairs]
        accepted.append((*is_hit, False).index(False))
        scores.append([round(100 * score) for score in tree.scores_BN[0].tolist()])
    return {"scores": scores, "accepted": accepted}


def main() -> None:
    torch.set_num_threads(1)
    tokenizer, target = load_tokenizer(TARGET), Llama4ForCausalLM.from_pretrained(TARGET)
    draft = Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, target)
    prompts = json.loads(HELDOUT_PROMPTS.read_text())["prompts"][:NUM_PROMPTS]
    with PATH.open("w") as file:
        for temperature in TEMPERATURES:
            for number, prompt in enumerate(prompts):
                ids = tokenizer.encode(prompt["text"]).ids
                trace = record(target, draft, ids, temperature, seed=number)
                about = {"temperature": temperature, "prompt": number}
                file.write(json.dumps(about | trace, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
