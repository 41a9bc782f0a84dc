"""The files that a rebuild ends with, and the notice's table of their SHA-256 sums."""

import hashlib
from pathlib import Path

from aerie.assets.build.corpus import CORPUS_PATH

HELD_OUT_PROMPTS = "heldout_prompts.json"
CHECKSUMS = "## Checksums (sha256)\n```\n"
RESULTS = (
    CORPUS_PATH.name,
    HELD_OUT_PROMPTS,
    *(f"target/{name}.json" for name in ("config", "generation_config", "tokenizer")),
    "target/model.safetensors",
    "draft/config.json",
    "draft/model.safetensors",
)


def refresh_checksums(out: Path) -> None:
    """Bring the notice's table of SHA-256 sums up to date, if there is a notice."""
    notice = out / "NOTICE.md"
    if not notice.is_file():
        return
    sums = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in RESULTS}
    table = "\n".join(f"{digest}  {name}" for name, digest in sums.items())
    before, _, rest = notice.read_text(encoding="utf-8").partition(CHECKSUMS)
    _, _, after = rest.partition("```\n")
    notice.write_text(f"{before}{CHECKSUMS}{table}\n```\n{after}", encoding="utf-8")
