"""The stages of the rebuild.

Each reads what the ones before it left in OUT/unfinished and leaves one file there, under its name
only once it is complete. OUT itself is touched by the last stage, which moves finished files into
it. So an interrupted rebuild goes on from the stage it was in and never looks like a result.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from aerie.assets.build.acceptance import measure
from aerie.assets.build.checkpoint import save_draft
from aerie.assets.build.choices import CHOICES, TEXTS, train_draft
from aerie.assets.build.corpus import CORPUS_PATH, cut_prompts, load_split
from aerie.assets.build.distill import distill
from aerie.assets.build.draft import Draft, frequent_ids, start_as_head
from aerie.assets.build.model import Llama4
from aerie.assets.build.results import HELD_OUT_PROMPTS, RESULTS, refresh_checksums
from aerie.assets.build.rows import RowSampler
from aerie.assets.build.target import new_target, save_target
from aerie.assets.build.tokenizer import train_tokenizer
from aerie.assets.build.training import ALONE, OWN_TEXT, TOGETHER, Leg, train

STAGES = ("text", "alone", "together", "distilled", "own_text", "choices", "finish")
DEMO_PROMPT = "The with statement"
HELD_OUT_FLOOR = 2.6  # acceptance length; a pair below it is not installed


class Rebuild:
    """One rebuild under way; every public method is a stage."""

    def __init__(self, out: Path, seed: int, device: str) -> None:
        self.out, self.seed, self.device = out, seed, device
        self.unfinished = out / "unfinished"

    def text(self) -> None:
        """Copy the frozen corpus, cut the held-out prompts, train the tokenizer."""
        (self.unfinished / "target").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CORPUS_PATH, self.unfinished / CORPUS_PATH.name)
        split = load_split()
        tokenizer = train_tokenizer(split.train[name] for name in sorted(split.train))
        prompts = cut_prompts(split.held_out, tokenizer)
        held_out = {"topics": sorted(split.held_out), "prompts": prompts}
        text = json.dumps(held_out, indent=2, ensure_ascii=False)
        (self.unfinished / HELD_OUT_PROMPTS).write_text(text + "\n", encoding="utf-8")
        tokenizer.save(str(self.unfinished / "target" / "tokenizer.json"))

    def alone(self) -> None:
        """Train the target by itself."""
        self._seed(0)
        model = new_target(self.device)
        self._train(ALONE, model, None, None)
        self._leave("alone", model.state_dict())

    def together(self) -> None:
        """Add a draft and train both on the topics."""
        self._seed(1)
        model = new_target(self.device)
        model.load_state_dict(self._left("alone"))
        draft = Draft(frequent_ids(self._topics())).to(self.device)
        start_as_head(draft, model.lm_head.weight, model.model.norm.weight)
        self._train(TOGETHER, model, draft, None)
        self._leave("together", _joined(model, draft))

    def distilled(self) -> None:
        """Let the target continue many prompts."""
        model, _ = self._pair("together")
        self._leave("distilled", {"ids": self._written(model, self.seed)})

    def own_text(self) -> None:
        """Train both on the topics and on what the target wrote."""
        self._seed(2)
        model, draft = self._pair("together")
        self._train(OWN_TEXT, model, draft, self._left("distilled")["ids"])
        self._leave("own_text", _joined(model, draft))

    def choices(self) -> None:
        """Let the finished target continue other prompts, and train the draft alone on that."""
        model, draft = self._pair("own_text")
        seeds = (self.seed + 1 + number for number in range(TEXTS))
        written_BT = torch.cat([self._written(model, seed) for seed in seeds])
        self._seed(3)
        train_draft(CHOICES, model, draft, written_BT)
        self._leave("choices", _joined(model, draft))

    def finish(self) -> None:
        """Write the checkpoint files, measure acceptance on them, and move them to OUT."""
        model, draft = self._pair("choices")
        save_target(model, self.unfinished / "target")
        save_draft(draft, self.unfinished / "draft")
        self._check_acceptance()
        for name in RESULTS:
            (self.out / name).parent.mkdir(exist_ok=True)
            (self.unfinished / name).replace(self.out / name)
        shutil.rmtree(self.unfinished)
        refresh_checksums(self.out)

    def _check_acceptance(self) -> None:
        held_out = json.loads((self.unfinished / HELD_OUT_PROMPTS).read_text(encoding="utf-8"))
        found = measure(self.unfinished, [prompt["text"] for prompt in held_out["prompts"]])
        print("held-out prompts:", found, file=sys.stderr)
        demo = measure(self.unfinished, [DEMO_PROMPT])
        print(f"{DEMO_PROMPT!r}: {demo}\n{demo.texts[0]}", file=sys.stderr, flush=True)
        if found.length < HELD_OUT_FLOOR:
            raise SystemExit(
                f"held-out acceptance length: must be at least {HELD_OUT_FLOOR}, got "
                f"{found.length:.3f}; nothing is installed, the pair is left in {self.unfinished}"
            )

    def _train(self, leg: Leg, model: Llama4, draft: Draft | None, own_BT: Tensor | None) -> None:
        sampler = RowSampler(self._topics(), self.seed + leg.steps)
        topic_rows = partial(sampler.rows, leg.topic_rows, leg.row_length)

        def rows() -> Tensor:
            if own_BT is None:
                return topic_rows()
            picked = torch.randint(len(own_BT), (leg.own_rows,))
            return torch.cat([topic_rows(), own_BT[picked].cpu()])

        train(leg, model, draft, rows)

    def _written(self, model: Llama4, seed: int) -> Tensor:
        """The target's continuations of training topics' pieces: [rows, row_length]."""
        texts = load_split().train
        return distill(model, [texts[name] for name in sorted(texts)], self._tokenizer(), seed)

    def _seed(self, offset: int) -> None:
        torch.manual_seed(4 * self.seed + offset)

    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.unfinished / "target" / "tokenizer.json"))

    def _topics(self) -> list[list[int]]:
        """Every training topic as token ids, without special tokens."""
        tokenizer, texts = self._tokenizer(), load_split().train
        encoded = [tokenizer.encode(texts[n], add_special_tokens=False) for n in sorted(texts)]
        return [encoding.ids for encoding in encoded]

    def _pair(self, stage: str) -> tuple[Llama4, Draft]:
        model, draft = new_target(self.device), Draft().to(self.device)
        tensors = self._left(stage)
        for prefix, module in (("target.", model), ("draft.", draft)):
            part = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            module.load_state_dict(part)
        return model, draft

    def _leave(self, stage: str, tensors: dict[str, Tensor]) -> None:
        path = self.unfinished / f"{stage}.safetensors"
        partial_path = path.with_suffix(".part")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial_path)
        partial_path.replace(path)

    def _left(self, stage: str) -> dict[str, Tensor]:
        path = self.unfinished / f"{stage}.safetensors"
        if not path.is_file():
            raise SystemExit(f"{path}: missing; run stage {stage!r} first")
        return load_file(path, device=self.device)


def _joined(model: Llama4, draft: Draft) -> dict[str, Tensor]:
    parts = {"target": model.state_dict(), "draft": draft.state_dict()}
    return {f"{name}.{key}": t for name, state in parts.items() for key, t in state.items()}
