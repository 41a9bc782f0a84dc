"""The stages of the rebuild; each reads what the earlier ones wrote under the output folder."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import Llama4ForCausalLM

from aerie.assets.build.acceptance import Rounds, measure, reached
from aerie.assets.build.checkpoint import load_draft, save_draft
from aerie.assets.build.corpus import CORPUS_PATH, cut_prompts, load_split
from aerie.assets.build.distill import distill
from aerie.assets.build.draft_training import DraftTraining, train_draft
from aerie.assets.build.joint_training import LEGS, train_jointly
from aerie.assets.build.target import RowSampler, TargetTraining, place, train_target
from aerie.assets.build.tokenizer import train_tokenizer

# The demo's prompt, and the number of drafted levels that acceptance is quoted for.
DEMO_PROMPT = "The with statement"
DEPTH = 4
HELD_OUT_PROMPTS = "heldout_prompts.json"
DISTILLED = "distilled.safetensors"
CHECKSUMS = "## Checksums (sha256)\n```\n"
CHECKED = (
    "corpus.txt",
    HELD_OUT_PROMPTS,
    *(f"target/{name}.json" for name in ("config", "generation_config", "tokenizer")),
    "target/model.safetensors",
    "draft/config.json",
    "draft/model.safetensors",
)


def training_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Every training topic as token ids, without special tokens."""
    topics = load_split().train
    encoded = (tokenizer.encode(topics[n], add_special_tokens=False) for n in sorted(topics))
    return [encoding.ids for encoding in encoded]


def load_tokenizer(out: Path) -> Tokenizer:
    """The tokenizer that the first stage wrote."""
    return Tokenizer.from_file(str(out / "target" / "tokenizer.json"))


def load_target(out: Path, device: str) -> Llama4ForCausalLM:
    """The shipped bfloat16 target, computing in float32."""
    model = Llama4ForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
    place(model, device)
    return model.eval()


def build_text(out: Path) -> None:
    """Copy the frozen corpus, train the tokenizer, cut the held-out prompts."""
    (out / "target").mkdir(parents=True, exist_ok=True)
    corpus_path = out / CORPUS_PATH.name
    if corpus_path.resolve() != CORPUS_PATH:
        corpus_path.write_bytes(CORPUS_PATH.read_bytes())
    split = load_split()
    tokenizer = train_tokenizer(split.train[name] for name in sorted(split.train))
    tokenizer.save(str(out / "target" / "tokenizer.json"))
    prompts = cut_prompts(split.held_out, tokenizer)
    write_json(out / HELD_OUT_PROMPTS, {"topics": sorted(split.held_out), "prompts": prompts})


def build_target(out: Path, seed: int, device: str) -> None:
    """Train the target and write it in transformers' own format."""
    topics = training_ids(load_tokenizer(out))
    model = train_target(topics, seed, device, TargetTraining())
    model.bfloat16().save_pretrained(out / "target")


def build_distilled(out: Path, seed: int, device: str) -> None:
    """Let the target continue many prompts; `remove_distilled` takes the text away again."""
    texts = load_split().train
    ordered = [texts[name] for name in sorted(texts)]
    ids_BT = distill(load_target(out, device), ordered, load_tokenizer(out), seed)
    save_file({"ids": ids_BT.to(torch.int16)}, out / DISTILLED)


def build_draft(out: Path, seed: int, device: str) -> None:
    """Train the draft and write it in the raw layout."""
    sampler = RowSampler(training_ids(load_tokenizer(out)), seed)
    distilled_BT = load_file(out / DISTILLED)["ids"].long()
    target = load_target(out, device)
    draft, kept_U = train_draft(target, distilled_BT, sampler, seed, DraftTraining())
    save_draft(draft, kept_U, out / "draft")


def build_jointly(out: Path, seed: int, device: str) -> None:
    """Train both on, together, and write both again."""
    torch.manual_seed(seed + 1)
    sampler = RowSampler(training_ids(load_tokenizer(out)), seed + 7)
    own_BT = load_file(out / DISTILLED)["ids"].long()
    target = load_target(out, device)
    draft, kept_U = load_draft(out / "draft", device)
    for leg in LEGS:
        train_jointly(target, draft, kept_U, own_BT, sampler, leg)
    target.bfloat16().save_pretrained(out / "target")
    save_draft(draft, kept_U, out / "draft")


def refresh_checksums(out: Path) -> None:
    """Bring the notice's table of SHA-256 sums up to date, if there is a notice."""
    notice = out / "NOTICE.md"
    if not notice.is_file():
        return
    sums = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in CHECKED}
    table = "\n".join(f"{digest}  {name}" for name, digest in sums.items())
    before, _, rest = notice.read_text(encoding="utf-8").partition(CHECKSUMS)
    _, _, after = rest.partition("```\n")
    notice.write_text(f"{before}{CHECKSUMS}{table}\n```\n{after}", encoding="utf-8")


def report_acceptance(out: Path, device: str) -> None:
    """Print acceptance on the held-out prompts and on the demo's prompt to stderr."""
    tokenizer, target = load_tokenizer(out), load_target(out, device)
    draft, kept_U = load_draft(out / "draft", device)
    prompts = json.loads((out / HELD_OUT_PROMPTS).read_text(encoding="utf-8"))["prompts"]

    def rounds(text: str) -> Rounds:
        return measure(target, draft, kept_U, tokenizer.encode(text).ids, depth=DEPTH)

    held_out = [rounds(prompt["text"]) for prompt in prompts]
    _print_acceptance("held-out prompts", held_out)
    demo = rounds(DEMO_PROMPT)
    _print_acceptance(DEMO_PROMPT, [demo])
    print(tokenizer.decode(demo.text_ids), file=sys.stderr)


def remove_distilled(out: Path) -> None:
    """The distilled text is a product of the rebuild, not one of its results."""
    (out / DISTILLED).unlink(missing_ok=True)


def _print_acceptance(label: str, rounds: list[Rounds]) -> None:
    shares = reached(rounds, DEPTH)
    conditional = [b / a if a else 0.0 for a, b in zip([1.0, *shares], shares, strict=False)]
    mean = sum(one.mean_length for one in rounds) / len(rounds)
    print(
        f"{label}: tokens per target pass {1 + sum(shares):.3f} (mean over prompts {mean:.3f})\n"
        f"  reached {[round(share, 3) for share in shares]}"
        f" conditional {[round(share, 3) for share in conditional]}",
        file=sys.stderr,
        flush=True,
    )


def write_json(path: Path, value: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
