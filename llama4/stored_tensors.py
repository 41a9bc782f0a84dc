"""What a safetensors folder holds, known from its headers before any tensor is read.

An index may name files outside the folder, a link may point there, and index and shards may
disagree. Here a folder is one unambiguous set of complete tensors or a CheckpointError that lists
every file that is not. Values are read with `pread` and never mapped: a file that shrinks is an
error instead of a crash, and what has been read does not stay resident behind the model's back.
"""

from collections.abc import Mapping
from heapq import nsmallest
from pathlib import Path

from aerie.llama4.json_fields import CheckpointError, read_json
from aerie.llama4.safetensors_header import PICKLE_REASON, StoredTensor, read_header

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_LISTED = 1000  # problems in one message
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADVICE = {  # what is said of files that stand there instead
    (".safetensors",): f"names are not guessed; a single file is {SINGLE}, shards need {INDEX}",
    (".gguf",): "GGUF is not read; take the safetensors that it was made from",
    PICKLES: PICKLE_REASON,
}


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of the folder's weights. Raises CheckpointError listing every unusable file."""
    index = _index(folder)
    files = sorted(set(index.values())) if index else [SINGLE]
    found: list[StoredTensor] = []
    problems: list[str] = []
    for file in files:
        try:
            check_inside(folder, folder / file)
            found += read_header(folder / file)
        except CheckpointError as error:
            problems.append(str(error))
    if not problems:
        problems = [*_duplicates(folder, found), *_disagreements(folder, index, found)]
    if problems:
        raise CheckpointError("\n  ".join(problems[:MAX_LISTED]))
    return found


def _index(folder: Path) -> Mapping[str, str]:
    """Shard of every tensor name; empty for a checkpoint in a single file."""
    if (folder / SINGLE).exists():
        return {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}{_instead(folder)}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: 'weight_map' must be a non-empty object")
    names = sorted({str(name) for name in weight_map.values()})
    wrong = [f"{folder / INDEX}: {_shard_fault(name)}" for name in names if _shard_fault(name)]
    if wrong:
        raise CheckpointError("\n  ".join(wrong))
    return {tensor: str(name) for tensor, name in weight_map.items()}


def _instead(folder: Path) -> str:
    """What the folder holds in place of weights, and what to do about it."""
    for suffixes, advice in ADVICE.items():
        held = sorted(file.name for file in folder.iterdir() if file.suffix in suffixes)
        if held:
            return f", only {', '.join(held[:3])}: {advice}"
    return ""


def _shard_fault(name: str) -> str:
    """What is wrong with the name of a shard, "" if nothing: it must mean one file everywhere."""
    if name.endswith(PICKLES):
        return f"{name!r} is not a plain safetensors file name: {PICKLE_REASON}"
    plain = Path(name).name == name and not set(name) & set('\\/:*?"<>|')
    if not plain or not name.isprintable() or not name.endswith(".safetensors"):
        return f"{name!r} is not a plain safetensors file name"
    return ""


def check_inside(folder: Path, file: Path) -> None:
    """A file may be a link only within its folder, or into the blobs of the hub's own cache."""
    home, target = folder.resolve(), file.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{file}: a link to {target}, outside its folder; put the file itself there"
        )


def _duplicates(folder: Path, found: list[StoredTensor]) -> list[str]:
    files: dict[str, list[str]] = {}
    for tensor in found:
        files.setdefault(tensor.name, []).append(tensor.file.name)
    return [
        f"{folder}: {name}: in {' and in '.join(shards)}"
        for name, shards in files.items()
        if len(shards) > 1
    ]


def _disagreements(folder: Path, index: Mapping[str, str], found: list[StoredTensor]) -> list[str]:
    """An index and the headers of its shards must name the same tensors."""
    if not index:
        return []
    held = {tensor.name: tensor.file.name for tensor in found}
    differing = [name for name in index.keys() | held.keys() if index.get(name) != held.get(name)]
    return [
        f"{folder / INDEX}: the index and the shard disagree about {name!r}: listed in "
        f"{index.get(name)}, held by {held.get(name)}"
        for name in nsmallest(MAX_LISTED, differing)
    ]
