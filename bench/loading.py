"""Loading a warm checkpoint of 415 MB: our strict loader, and `safetensors.torch.load_file`.

`load_file` maps the file and reads nothing, so it is shown three ways: as it is; with every page
touched, which leaves the weights in the file's own cache; and cloned into memory of its own, which
is what a loader that keeps its weights has to do. Ours reads into such memory, checks every header
and value, and turns what the backend reads crosswise: the eager one its linears, the kernels the
fused experts (which a GPU turns itself).
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aerie.kernels.backend import ResolvedBackend
from aerie.llama4.config import Llama4Config
from aerie.llama4.model import Llama4ForCausalLM

ROUNDS = 7
FILE = "model.safetensors"
VALUES = {
    "model_type": "llama4_text",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "intermediate_size_mlp": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_local_experts": 14,
    "max_position_embeddings": 1024,
}


def _cloned(folder: Path) -> Any:
    return {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}


def _touched(folder: Path) -> Any:
    tensors = load_file(folder / FILE)
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[::4096].sum()
    return tensors


def _ours(folder: Path, backend: ResolvedBackend = "eager", check_finite: bool = True) -> Any:
    with pytest.MonkeyPatch.context() as patch:  # a layout; no kernel is launched
        patch.setattr("aerie.llama4.model.resolve", lambda backend, device: backend)
        return Llama4ForCausalLM.from_pretrained(
            folder, torch.bfloat16, backend=backend, check_finite=check_finite
        )


LOADERS: dict[str, Callable[[Path], Any]] = {
    "load_file": lambda folder: load_file(folder / FILE),
    "load_file, touched": _touched,
    "load_file, cloned": _cloned,
    "aerie": _ours,
    "aerie, values unchecked": lambda folder: _ours(folder, check_finite=False),
    "aerie, as the kernels read": lambda folder: _ours(folder, "triton"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights under Hugging Face's names; just written, so in the system's cache."""
    folder, shapes = tmp_path_factory.mktemp("checkpoint"), _shapes()
    (folder / "config.json").write_text(json.dumps(VALUES))
    tensors = {name: torch.rand(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / FILE)
    return folder


def _shapes() -> dict[str, torch.Size]:
    model = Llama4ForCausalLM.without_values(Llama4Config.from_hf(VALUES))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def seconds(checkpoint) -> dict[str, list[float]]:
    """All loaders in turns: what else the machine does slows each."""
    seconds: dict[str, list[float]] = {name: [] for name in LOADERS}
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        for name, load in LOADERS.items():
            start = time.perf_counter()
            loaded = load(checkpoint)
            seconds[name].append(time.perf_counter() - start)
            del loaded
    return {name: values[1:] for name, values in seconds.items()}


@pytest.mark.parametrize("loader", LOADERS)
def bench_loading(loader, benchmark, environment, checkpoint, seconds):
    benchmark.pedantic(LOADERS[loader], args=(checkpoint,), rounds=1)
    size = (checkpoint / FILE).stat().st_size
    benchmark.extra_info |= environment | {
        "gb_per_second": size / 1e9 / median(seconds[loader]),
        "x_load_file_cloned": median(seconds["load_file, cloned"]) / median(seconds[loader]),
    }
