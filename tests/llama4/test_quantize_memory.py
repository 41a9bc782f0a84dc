"""Peak memory of loading: what stays and little more, never a file or a model in BF16 beside it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aerie.embedded import TARGET
from aerie.llama4.model import Llama4ForCausalLM

LAYERS, EXPERTS, HIDDEN, WIDTH, VOCAB = 4, 16, 1024, 1024, 64
VALUES = {
    "model_type": "llama4_text",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": WIDTH,
    "interleave_moe_layer_step": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": EXPERTS,
    "max_position_embeddings": 64,
}
LAYER_BYTES = 2 * EXPERTS * 3 * WIDTH * HIDDEN  # the experts of one layer in BF16: 101 MB
PEAK = """
import sys
import torch
from pathlib import Path
from aerie.llama4.convert import convert
from aerie.llama4.model import Llama4ForCausalLM
{work}
lines = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""  # not ru_maxrss: a new process inherits its parent's
EXTRA = """
import sys
import torch
from pathlib import Path
from aerie.llama4.model import Llama4ForCausalLM
def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
def load(folder, device):
    return Llama4ForCausalLM.from_pretrained(folder, torch.bfloat16, device, "triton")
load(sys.argv[1], "cpu")
for device in ("meta", "cpu"):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    model = load(sys.argv[2], device)
    print(status("VmHWM") - before)
print(sum(parameter.nbytes for parameter in model.parameters()))
"""
LOAD = """
model = Llama4ForCausalLM.from_pretrained(
    sys.argv[1], torch.bfloat16, quantize=sys.argv[2], quantize_linears=True
)
"""
CONVERT = "convert(sys.argv[1], Path(sys.argv[2]), 'fp8', linears=True)"


def write_source(folder: Path) -> Path:
    """A layer's values are the same in all of them: only their bytes matter here."""
    shapes = {f"self_attn.{name}_proj.weight": (128, HIDDEN) for name in "qkv"}
    shapes |= {"self_attn.o_proj.weight": (HIDDEN, 128), "input_layernorm.weight": (HIDDEN,)}
    shapes |= {"post_attention_layernorm.weight": (HIDDEN,)}
    shapes |= {"feed_forward.router.weight": (EXPERTS, HIDDEN)}
    for name in ("gate", "up", "down"):  # square, as WIDTH is HIDDEN
        shapes[f"feed_forward.shared_expert.{name}_proj.weight"] = (WIDTH, HIDDEN)
    shapes["feed_forward.experts.gate_up_proj"] = (EXPERTS, HIDDEN, 2 * WIDTH)
    shapes["feed_forward.experts.down_proj"] = (EXPERTS, WIDTH, HIDDEN)
    one = {name: torch.rand(shape).bfloat16() for name, shape in shapes.items()}
    layers = range(LAYERS)
    tensors = {f"model.layers.{n}.{name}": t.clone() for n in layers for name, t in one.items()}
    tensors["model.embed_tokens.weight"] = torch.rand(VOCAB, HIDDEN).bfloat16()
    tensors |= {"lm_head.weight": torch.rand(VOCAB, HIDDEN).bfloat16()}
    tensors["model.norm.weight"] = torch.rand(HIDDEN).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(VALUES | {"num_hidden_layers": LAYERS}))
    return folder


def write_shards(folder: Path) -> Path:
    """A file per layer, as large checkpoints have them."""
    source = write_source(folder)
    whole, weight_map = load_file(source / "model.safetensors"), {}
    for layer in range(LAYERS):
        names = [n for n in whole if f"layers.{layer}." in n or (layer == 0 and "layers." not in n)]
        part = {name: whole[name] for name in names}
        save_file(part, source / f"{layer}.safetensors")
        weight_map |= dict.fromkeys(part, f"{layer}.safetensors")
    (source / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    return source


def peak(work: str, *arguments: str) -> int:
    """The most bytes that a fresh process which does this work ever had resident."""
    command = [sys.executable, "-c", PEAK.format(work=work), *arguments]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed) * 1024


def resident(folder: Path) -> int:
    """Bytes of the model's weights."""
    model = Llama4ForCausalLM.from_pretrained(folder, torch.bfloat16, "meta", "eager")
    return sum(parameter.nbytes for parameter in model.parameters())


needs_peak = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's count of a peak"
)


@needs_peak
def test_peak_of_reading_shards(tmp_path):
    """Nothing stays on the host for "meta", as for a model on a GPU; for "cpu" the model does.

    The largest tensor has 67 MB, a shard 114 MB. With 2 threads the pieces took 9 MB.
    """
    source = write_shards(tmp_path / "source")
    command = [sys.executable, "-c", EXTRA, str(TARGET), str(source)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    on_meta, on_cpu, stays = map(int, printed.split())
    largest = LAYER_BYTES * 2 // 3
    assert stays > LAYERS * LAYER_BYTES
    assert 0 < on_meta <= largest
    assert 0.9 * stays < on_cpu <= stays + largest


@needs_peak
def test_peak(tmp_path):
    """Over a process that does the same with the embedded target, of a few megabytes.

    With 2 threads loading had 13 MB more than its result, with 8 it had 81 MB (a buffer and an
    expert each); converting had 42 MB; reading all of it in BF16 would have 180 MB.
    """
    source, made = write_source(tmp_path / "source"), tmp_path / "made"
    small = peak(LOAD, str(TARGET), "fp8")
    assert peak(CONVERT, str(source), str(made)) - small <= 1.5 * LAYER_BYTES
    size = resident(made)
    assert LAYERS * LAYER_BYTES / 2 < size < LAYERS * LAYER_BYTES * 0.6
    loading = peak(LOAD, str(source), "fp8") - small
    assert size < loading <= size + 1.5 * LAYER_BYTES
