"""Strict reading of a safetensors folder into a module: every tensor accounted for, both ways.

A draft that loads wrongly stays lossless and merely accepts nothing; a target that loads wrongly is
fluent nonsense. So nothing is skipped, guessed or filled in, and all that is wrong is listed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aerie.llama4.json_fields import CheckpointError, read_json
from aerie.llama4.packing import join_all

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE = (torch.float16, torch.bfloat16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
MAX_LISTED = 1000  # problems in one message


@dataclass(frozen=True)
class Renaming:
    """How tensor names of the files become parameter names.

    `prefixes` are replaced at the start of a name (first match). Names in `ignored`, or under one
    of its entries that ends with a dot, are left out on purpose.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def __call__(self, name: str) -> str | None:
        """The parameter's name, or None for a tensor that is left out."""
        folders = tuple(entry for entry in self.ignored if entry.endswith("."))
        if name in self.ignored or name.startswith(folders):
            return None
        for old, new in self.prefixes.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name


def resolve_folder(path: str | Path) -> Path:
    """A local checkpoint folder; a string `owner/name` that is none is fetched from the hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: is a file; give the folder that holds config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise CheckpointError(f"{path}: no such folder, nor a hub id of the form owner/name")
    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client raises many unrelated types
        raise CheckpointError(
            f"{path}: no such folder, and fetching it as a hub id failed ({error})"
        ) from error


def load_weights(
    module: nn.Module,
    folder: Path,
    renaming: Callable[[str], str | None],
    dtype: torch.dtype,
    device: torch.device | str,
    optional: tuple[str, ...] = (),
) -> None:
    """Replaces the (meta) parameters of `module` by the folder's tensors, cast to `dtype`.

    Integer buffers such as a vocabulary map become int64; an `optional` tensor that is
    absent keeps the module's value. Raises CheckpointError.
    """
    found = read_tensors(folder, renaming)
    tied = _tied(module)
    expected = {k: v for k, v in module.state_dict().items() if k not in tied}
    expected = {k: v for k, v in expected.items() if k in found or k not in optional}
    problems = _differences(expected, found)
    fitting = [k for k, v in expected.items() if k in found and _fits_dtype(found[k], v)]
    loaded = {name: _cast(found[name], dtype, device) for name in fitting}
    problems += [f"{k}: not finite in {v.dtype}" for k, v in loaded.items() if not _is_finite(v)]
    if problems:
        listed = "\n  ".join(problems[:MAX_LISTED])
        raise CheckpointError(f"{folder}: {len(problems)} tensors are wrong:\n  {listed}")
    join_all(module, loaded)
    module.load_state_dict(loaded, strict=False, assign=True)
    for alias, name in tied.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(name))
    module.to(device).eval().requires_grad_(False)


def read_tensors(folder: Path, renaming: Callable[[str], str | None]) -> dict[str, Tensor]:
    """All tensors of the folder under their parameter names, memory-mapped."""
    tensors: dict[str, Tensor] = {}
    index = _index(folder)
    for file in sorted(set(index.values())) if index else [folder / SINGLE]:
        try:
            with safe_open(file, framework="pt") as shard:
                names = shard.keys()
                _check_index(index, file, set(names))
                for name in names:
                    renamed = renaming(name)
                    if renamed in tensors:
                        raise CheckpointError(f"{file}: tensor {renamed} appears twice")
                    if renamed is not None:
                        tensors[renamed] = shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            hint = "; it is a Git-LFS pointer, run git lfs pull" if _is_lfs_pointer(file) else ""
            raise CheckpointError(
                f"{file}: not a readable safetensors file ({error}){hint}"
            ) from error
    return tensors


def _index(folder: Path) -> dict[str, Path]:
    """Shard file of every tensor name; empty for a checkpoint in a single file."""
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: 'weight_map' must be a non-empty object")
    for name in set(map(str, weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / INDEX}: {name!r} is not a plain safetensors file name"
            )
    return {tensor: folder / str(name) for tensor, name in weight_map.items()}


def _check_index(index: Mapping[str, Path], file: Path, names: set[str]) -> None:
    """An index and the headers of its shards must name the same tensors."""
    listed = {name for name, shard in index.items() if shard == file}
    if index and listed != names:
        raise CheckpointError(
            f"{file}: the index and the shard disagree about {sorted(listed ^ names)[:5]}"
        )


def _is_lfs_pointer(file: Path) -> bool:
    return file.is_file() and file.open("rb").read(24) == b"version https://git-lfs."


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name}: missing" for name in expected if name not in found]
    extra = [f"{name}: unexpected" for name in found if name not in expected]
    wrong = [
        f"{name}: shape {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = [
        f"{name}: {found[name].dtype}, expected {_kind(tensor)}"
        for name, tensor in expected.items()
        if name in found and not _fits_dtype(found[name], tensor)
    ]
    return missing + extra + wrong + kinds


def _fits_dtype(found: Tensor, expected: Tensor) -> bool:
    return found.dtype in (READABLE if expected.is_floating_point() else INTEGERS)


def _kind(expected: Tensor) -> str:
    return "float16, bfloat16 or float32" if expected.is_floating_point() else "int32 or int64"


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _tied(module: nn.Module) -> dict[str, str]:
    """Second names of parameters that two modules share, by their first names."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    everything = module.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in everything if name != first[id(p)]}


def _cast(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else torch.int64)
