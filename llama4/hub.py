"""Where a checkpoint's folder comes from: the local disk, or the Hugging Face hub's own cache.

The hub's client honours its offline switch and shows its progress on a terminal's stderr. Only what
a checkpoint is read from is asked for: no pickles, no code, nothing in subfolders.
"""

import re
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from aerie.llama4.json_fields import CheckpointError

DESCRIPTION = ("*.json", "*.jinja", "tokenizer.model")  # configs and tokenizer
WEIGHTS = ("*.safetensors",)
SUBFOLDERS = ("*/*",)


def resolve_folder(
    path: str | Path, revision: str | None = None, with_weights: bool = True
) -> Path:
    """A local checkpoint folder; a string `owner/name` that is none is fetched from the hub.

    `revision` pins a hub id to a commit, tag or branch. Without weights only what describes them is
    fetched. Raises CheckpointError.
    """
    folder = Path(path)
    if folder.exists() and revision is not None:
        raise CheckpointError(
            f"revision: pins hub ids, and {path} is on this disk; leave {revision!r} out"
        )
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise CheckpointError(f"{path}: no such folder, nor a hub id of the form owner/name")
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise CheckpointError(f"revision: {revision!r} is no commit, tag or branch of the hub")
    wanted = [*DESCRIPTION, *(WEIGHTS if with_weights else ())]
    try:
        return Path(_fetched(str(path), revision, wanted))
    except Exception as error:  # the hub client raises many unrelated types
        pin = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"{path}: no such folder, and fetching it as a hub id{pin} failed ({error})"
        ) from error


def _fetched(repo: str, revision: str | None, wanted: list[str]) -> str:
    fetch = partial(
        snapshot_download,
        repo,
        revision=revision,
        allow_patterns=wanted,
        ignore_patterns=list(SUBFOLDERS),
    )
    try:
        return fetch()
    except OfflineModeIsEnabled as offline:  # huggingface_hub 1.33 asks for a commit that it has
        try:
            return fetch(local_files_only=True)
        except LocalEntryNotFoundError:
            raise offline from None
