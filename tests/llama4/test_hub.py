"""Hub ids without a network: the hub's own client on a cache laid out as it leaves one.

Regimes: branch, tag and commit of a snapshot; pins of target and draft that decide what is loaded;
what is not cached; which files are asked for; revisions that are none.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aerie.cli import app
from aerie.eagle3.registry import load_draft
from aerie.embedded import DRAFT, TARGET
from aerie.llama4 import hub
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM

OLD, NEW = "a" * 40, "b" * 40  # commits
NORM = "model.norm.weight"


class Cache:
    """A hub cache: blobs, snapshots of links to them by commit, and refs by name."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self, repo: str, commit: str, source: Path, *refs: str, **changed: torch.Tensor
    ) -> Path:
        """A snapshot with the files of `source`, whose tensors are `changed`."""
        home = self.root / f"models--{repo.replace('/', '--')}"
        snapshot = home / "snapshots" / commit
        for folder in (home / "blobs", home / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            blob = home / "blobs" / f"{commit[:8]}-{file.name}"
            blob.write_bytes(file.read_bytes())
            if file.suffix == ".safetensors" and changed:
                save_file(load_file(file) | changed, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        for ref in refs:
            (home / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (home / "refs" / ref).write_text(commit)
        return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Cache(tmp_path)


def test_branch_tag_and_commit(cache):
    old = cache.add("an-owner/a.model", OLD, TARGET, "v1")
    new = cache.add("an-owner/a.model", NEW, TARGET, "main", "refs/pr/3")
    assert resolve_folder("an-owner/a.model") == new
    assert resolve_folder("an-owner/a.model", "v1") == old
    assert resolve_folder("an-owner/a.model", OLD) == old
    assert resolve_folder("an-owner/a.model", "refs/pr/3") == new


def test_a_pin_decides_what_is_loaded(cache):
    ours, width = load_file(TARGET / "model.safetensors"), 128
    for commit, value in ((OLD, 1.0), (NEW, 2.0)):
        values = torch.full((width,), value, dtype=ours[NORM].dtype)
        cache.add("owner/target", commit, TARGET, "main", **{NORM: values})
        cache.add("owner/draft", commit, DRAFT, "main", **{"norm.weight": values})
    for revision, value in ((OLD, 1.0), (NEW, 2.0), (None, 2.0)):
        target = Llama4ForCausalLM.from_pretrained("owner/target", revision=revision)
        draft = load_draft("owner/draft", target, revision=revision)
        assert target.model.norm.weight.unique().tolist() == [value]
        assert draft.norm.weight.unique().tolist() == [value]


def test_the_command_line_pins_both(cache):
    for repo, source in (("owner/target", TARGET), ("owner/draft", DRAFT)):
        cache.add(repo, OLD, source, "v1")
    pair = ("--model", "owner/target", "--draft", "owner/draft")
    prompt = ("generate", *pair, "--prompt", "A class", "--max-new-tokens", "2", "--json")
    pinned = CliRunner().invoke(app, [*prompt, "--revision", "v1", "--draft-revision", OLD])
    assert len(json.loads(pinned.stdout)["token_ids"]) == 2
    loose = CliRunner().invoke(app, [*prompt, "--revision", "v1"])
    assert loose.exit_code == 2
    assert "owner/draft: no such folder, and fetching it as a hub id failed" in loose.stderr
    config = json.dumps({"revision": "v1"})
    asked = [*prompt, "--revision", "v1", "--speculative-config", config]
    assert CliRunner().invoke(app, asked).exit_code == 0
    inspected = CliRunner().invoke(app, ["inspect", "owner/target", "--revision", "v1", "--json"])
    assert json.loads(inspected.stdout)["problems"] == []


def test_converting_takes_a_pin(cache, tmp_path):
    cache.add("owner/target", OLD, TARGET, "v1")
    made = ("convert", "owner/target", str(tmp_path / "made"), "--experts", "fp8")
    assert CliRunner().invoke(app, [*made, "--revision", "v2"]).exit_code == 2
    assert CliRunner().invoke(app, [*made, "--revision", "v1"]).exit_code == 0
    assert (tmp_path / "made" / "tokenizer.json").is_file()


@pytest.mark.parametrize("revision", [None, "v2", "c" * 40])
def test_what_is_not_cached_is_an_error_offline(revision, cache):
    cache.add("owner/target", OLD, TARGET, "v1")
    with pytest.raises(CheckpointError) as error:
        resolve_folder("owner/target", revision)
    assert "owner/target: no such folder, and fetching it as a hub id" in str(error.value)
    assert "HF_HUB_OFFLINE" in str(error.value)
    assert revision is None or f"at revision {revision!r} failed" in str(error.value)


FILES = {
    "config.json": True,
    "generation_config.json": True,
    "hf_quant_config.json": True,
    "tokenizer.json": True,
    "tokenizer.model": True,
    "chat_template.jinja": True,
    "model.safetensors.index.json": True,
    "model-00001-of-00002.safetensors": "weights",
    "pytorch_model.bin": False,
    "consolidated.00.pth": False,
    "modeling_llama4.py": False,
    "README.md": False,
    "original/params.json": False,
    "onnx/model.safetensors": False,
}


@pytest.mark.parametrize("with_weights", [True, False])
def test_only_what_a_checkpoint_is_read_from_is_asked_for(with_weights, monkeypatch, tmp_path):
    asked = {}

    def download(repo: str, **options) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert resolve_folder("owner/name", with_weights=with_weights) == tmp_path
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    wanted = {name for name, use in FILES.items() if use is True or (use and with_weights)}
    assert set(filter_repo_objects(FILES, **patterns)) == wanted


@pytest.mark.parametrize(
    "revision", ["", "../../x", "a/../b", "/etc", "v1 ", "--x", "v1\n"], ids=repr
)
def test_refuses_revisions_that_are_none(revision, cache):
    with pytest.raises(CheckpointError, match="is no commit, tag or branch of the hub"):
        resolve_folder("owner/target", revision)


def test_a_folder_has_no_revision():
    with pytest.raises(CheckpointError, match="revision: pins hub ids"):
        resolve_folder(TARGET, "main")
