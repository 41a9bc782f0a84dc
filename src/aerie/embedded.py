"""Where the checkpoint pair that ships with the package lies (see assets/NOTICE.md)."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TARGET = ASSETS / "target"
DRAFT = ASSETS / "draft"
HELDOUT_PROMPTS = ASSETS / "heldout_prompts.json"  # texts neither model was trained on
