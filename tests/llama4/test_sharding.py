"""What each rank holds and reads of a target, without a second process.

Regimes: every divisor of Llama 4's 40 heads, so that key/value heads are split, repeated and do not
fill their groups; widths that a size does not divide; all parts together are the whole, in every
format and layout of files (fused, one by one, several files, FP8 per tensor, channel and block,
made FP8 while reading); bytes read; sizes, blocks and biases that are refused.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aerie.llama4.attention_config import AttentionSpec
from aerie.llama4.checkpoint import LoadOptions, load_weights
from aerie.llama4.communicator import LoneRank
from aerie.llama4.config import Llama4Config
from aerie.llama4.convert import convert
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import RENAME, Llama4ForCausalLM
from aerie.llama4.quantization import quantized_on_load, read_quantization
from aerie.llama4.sharding import Shard, check_shard, local_attention
from aerie.llama4.stored_shards import rank_reader
from tests.llama4 import fp8_files
from tests.llama4.test_fp8_formats import in_memory

SIZES = [1, 2, 4, 5, 8, 10, 20, 40]


def ranks(size: int, expert_parallel: bool = False) -> list[Shard]:
    return [Shard(rank, size, expert_parallel) for rank in range(size)]


def load_rank(
    folder: Path, shard: Shard, quantize=None, check_finite: bool = True
) -> Llama4ForCausalLM:
    """As `from_pretrained` with a group, without the group."""
    config, quantization = Llama4Config.from_pretrained(folder), read_quantization(folder)
    if quantize:
        quantization = quantized_on_load(folder, quantization, quantize, True)
    model = Llama4ForCausalLM.without_values(config, "eager", "cpu", quantization, LoneRank(shard))
    options = LoadOptions(
        torch.float32,
        "cpu",
        quantize=quantize is not None,
        check_finite=check_finite,
        rank_reader=rank_reader(config, shard),
    )
    load_weights(model, folder, RENAME, options)
    return model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("total", [8192, 16384, 202048, 5000, 41])
def test_parts_follow_one_another(total, size):
    parts = [shard.part(total) for shard in ranks(size)]
    ends = [0, *(part.stop for part in parts)]
    assert ends[-1] == total
    assert [part.start for part in parts] == ends[:-1]
    widths = [part.stop - part.start for part in parts]
    assert 0 < max(widths) <= 2 * min(widths)
    if total == 8192:
        assert all(end % 128 == 0 for end in ends), "FP8 blocks are cut"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kv_heads", [1, 2, 8, 40])
def test_every_query_head_finds_its_key_head(size, kv_heads):
    spec = AttentionSpec(8, 8, 40, kv_heads, 4, False, None, None, None, None)
    seen = []
    for shard in ranks(size):
        local, held = local_attention(spec, shard), shard.kv_heads(40, kv_heads)
        assert len(held) == local.num_kv_heads
        group = local.num_heads // local.num_kv_heads
        for index, head in enumerate(shard.heads(40)):
            assert held[index // group] == head // (40 // kv_heads)
            seen.append(head)
    assert seen == list(range(40))
    if kv_heads % size == 0:
        assert sum(len(shard.kv_heads(40, kv_heads)) for shard in ranks(size)) == kv_heads


VALUES = {
    "model_type": "llama4_text",
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 56,
    "intermediate_size_mlp": 80,
    "num_hidden_layers": 2,
    "interleave_moe_layer_step": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}


def write(folder: Path, files: int = 1, **changes) -> Path:
    """A random unquantised checkpoint, in several files if asked."""
    folder.mkdir(exist_ok=True)
    values = VALUES | changes
    (folder / "config.json").write_text(json.dumps(values))
    model = Llama4ForCausalLM(Llama4Config.from_hf(values), "eager")
    for parameter in model.parameters():
        parameter.data.normal_()
    tensors = {name: x.contiguous() for name, x in model.state_dict().items()}
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        own = {name: x for name, x in tensors.items() if weight_map[name] == file}
        save_file(own, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def together(parts: list[Tensor], name: str, kv_heads: int) -> Tensor:
    """The ranks' parts of one stored tensor as a whole, by rules spelled out a second time."""
    leaf = next(word for word in reversed(name.split(".")) if word != "weight")
    if leaf in ("k_proj", "v_proj"):
        queries, pieces = VALUES["num_attention_heads"], {}
        for rank, part in enumerate(parts):
            held = Shard(rank, len(parts)).kv_heads(queries, kv_heads)
            pieces |= dict(zip(held, part.chunk(len(held)), strict=True))
        return torch.cat([pieces[head] for head in range(kv_heads)])
    if leaf == "gate_up_proj":
        return torch.cat([half for i in (0, 1) for half in (p.chunk(2, -1)[i] for p in parts)], -1)
    if leaf in ("o_proj", "down_proj"):
        return torch.cat(parts, dim=1)  # of a fused [E, F, D] too
    if leaf in ("q_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"):
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts), name
    return parts[0]


@pytest.mark.parametrize(
    ("size", "kv_heads", "files"), [(2, 2, 1), (4, 2, 3), (8, 1, 2), (8, 4, 1)]
)
def test_parts_of_a_checkpoint_are_the_whole(size, kv_heads, files, tmp_path):
    folder = write(tmp_path, files, num_key_value_heads=kv_heads)
    whole = Llama4ForCausalLM.from_pretrained(folder, backend="eager").state_dict()
    parts = [load_rank(folder, shard).state_dict() for shard in ranks(size)]
    assert all(part.keys() == whole.keys() for part in parts)
    for name, expected in whole.items():
        assert torch.equal(together([p[name] for p in parts], name, kv_heads), expected), name


def test_experts_are_dealt_out_whole(tmp_path):
    folder = write(tmp_path)
    whole = Llama4ForCausalLM.from_pretrained(folder, backend="eager").state_dict()
    parts = [load_rank(folder, shard).state_dict() for shard in ranks(2, expert_parallel=True)]
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.feed_forward.experts.{leaf}"
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    name = "model.layers.1.feed_forward.shared_expert.down_proj.weight"
    assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole[name])


@pytest.mark.parametrize("name", fp8_files.FORMATS)
def test_fp8_scales_follow_their_codes(name, tmp_path, monkeypatch):
    """Twice the heads and widths of the other tests, so that two ranks have whole blocks."""
    shapes = {"EXPERT": 256, "DENSE": 512, "HEADS": 256}
    for table, width in shapes.items():
        own = getattr(fp8_files, table)
        larger = {n: tuple(width if d != 160 else d for d in shape) for n, shape in own.items()}
        monkeypatch.setattr(fp8_files, table, larger)
    monkeypatch.setattr(fp8_files, "WIDTH", 256)
    sizes = {"intermediate_size": 256, "intermediate_size_mlp": 512, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4}
    monkeypatch.setattr(fp8_files, "VALUES", fp8_files.VALUES | sizes)
    made = fp8_files.FORMATS[name]()
    folder = made.write(tmp_path)
    parts = [in_memory(load_rank(folder, shard)) for shard in ranks(2)]
    for module, expected in made.truth.items():
        assert torch.equal(together([part[module] for part in parts], module, 4), expected), module


@pytest.mark.parametrize("name", ["compressed-tensors block", "fp8 block"])
def test_refuses_a_part_of_a_block(name, tmp_path):
    made = fp8_files.FORMATS[name]()
    with pytest.raises(CheckpointError, match=r"128 rows \(on each rank\).*self_attn.q_proj': 64"):
        load_rank(made.write(tmp_path), Shard(0, 2))


def test_dealt_out_fp8_experts_alone(tmp_path):
    """Experts one by one: those of other ranks are not missed, and have other numbers."""
    folder = write(tmp_path / "source")
    made = convert(folder, tmp_path / "made", "fp8")
    whole = in_memory(Llama4ForCausalLM.from_pretrained(made.folder, backend="eager"))
    for rank, shard in enumerate(ranks(2, expert_parallel=True)):
        own = in_memory(load_rank(made.folder, shard))
        for e in (0, 1):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                name = "model.layers.1.feed_forward.experts.{}." + leaf
                assert torch.equal(own[name.format(e)], whole[name.format(2 * rank + e)])


@pytest.mark.parametrize("quantize", ["fp8", "fp8_block"])
def test_quantised_on_load(quantize, tmp_path):
    """Rows that a rank has whole get the codes of one process; of others it scales its columns."""
    folder = write(tmp_path, intermediate_size=512, intermediate_size_mlp=256, head_dim=128)
    whole = in_memory(Llama4ForCausalLM.from_pretrained(
        folder, backend="eager", quantize=quantize, quantize_linears=True
    ))  # fmt: skip
    parts = [in_memory(load_rank(folder, shard, quantize)) for shard in ranks(2)]
    for name, expected in whole.items():
        found = together([part[name] for part in parts], name, 2)
        if quantize == "fp8_block" or not name.endswith(("o_proj", "down_proj")):
            assert torch.equal(found, expected), name
        else:
            assert (found - expected).abs().max() <= expected.abs().max() / 16


@pytest.mark.parametrize("size", [2, 4, 8])
def test_reads_its_slices_only(size, tmp_path, monkeypatch):
    """Bytes that go through `preadv`: the rank's parameters, and not a byte more."""
    folder, read = write(tmp_path, files=2), []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: read.append(n := preadv(*a)) or n)
    whole = sum(x.nbytes for x in Llama4ForCausalLM.from_pretrained(folder).parameters())
    assert sum(read) == whole
    for shard in ranks(size):
        read.clear()
        model = load_rank(folder, shard)
        own = sum(parameter.nbytes for parameter in model.parameters())
        replicated = sum(
            x.nbytes for n, x in model.named_parameters() if "norm" in n or "router" in n
        )
        assert sum(read) == own
        keys = 2 * len(shard.kv_heads(8, 2)) * 16 * 64 * 4 * 2
        assert own <= 1.05 * (whole / size + replicated + keys)


def test_a_damaged_slice_is_seen_by_its_rank(tmp_path):
    folder = write(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 100] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    load_rank(folder, Shard(0, 2))
    with pytest.raises(CheckpointError, match=r"o_proj.weight: not finite in torch.float32: 1 of"):
        load_rank(folder, Shard(1, 2))


@pytest.mark.parametrize("shape", [(7, 64), (128, 64, 1), (128,)])
def test_wrong_shapes_are_reported(shape, tmp_path):
    folder = write(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.weight: shape .* expected \(64, 64\)"):
        load_rank(folder, Shard(1, 2))


def test_rejects_sizes_that_do_not_cut_the_model():
    config = Llama4Config.from_hf(VALUES)
    with pytest.raises(ValueError, match="divide the target's 8 heads: one of 1, 2, 4, 8; got 3"):
        check_shard(config, Shard(0, 3))
    dealt = Shard(0, 8, expert_parallel=True)
    with pytest.raises(ValueError, match="8 heads and its 4 experts: one of 1, 2, 4; got 8"):
        check_shard(config, dealt)
    with pytest.raises(ValueError, match="attention_bias is not cut"):
        check_shard(Llama4Config.from_hf(VALUES | {"attention_bias": True}), Shard(0, 2))
