"""Every FP8 format of targets: loaded bit for bit, and refused where a number would be a guess."""

import json

import pytest
import torch
from torch import Tensor

from aerie.kernels import scaled_linear
from aerie.kernels.linear import Linear
from aerie.llama4.attention import Attention
from aerie.llama4.experts import Experts
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.packing import PackedModule, Packing
from aerie.llama4.weight_quantization import spread_blocks
from tests.llama4.fp8_files import FORMATS, FP8, Checkpoint

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.feed_forward.experts.1.up_proj"
FUSED = "model.layers.1.feed_forward.experts.gate_up_proj"


def load(folder, backend="eager", device="cpu", **options) -> Llama4ForCausalLM:
    return Llama4ForCausalLM.from_pretrained(folder, device=device, backend=backend, **options)


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    if scale.ndim < weight.ndim:
        scale = scale[..., None]
    if scale.shape[-1] > 1 or scale.shape[-2] not in (1, weight.shape[-2]):
        scale = spread_blocks(scale, weight.shape)
    return weight.double() * scale.double()


def experts_of(model: Llama4ForCausalLM) -> Experts:
    experts = model.get_submodule("model.layers.1.feed_forward.experts")
    assert isinstance(experts, Experts)
    return experts


def attention_of(model: Llama4ForCausalLM, layer: int) -> Attention:
    attention = model.get_submodule(f"model.layers.{layer}.self_attn")
    assert isinstance(attention, Attention)
    return attention


def in_memory(model: torch.nn.Module) -> dict[str, Tensor]:
    """All FP8 projections of a model, dequantised, under the names of their parts."""
    found: dict[str, Tensor] = {}
    for prefix, owner in model.named_modules():
        if isinstance(owner, Experts) and owner.is_fp8:
            assert owner.gate_up_proj_scale is not None
            assert owner.down_proj_scale is not None
            gate_up = dequantised(owner.gate_up_proj, owner.gate_up_proj_scale)
            down = dequantised(owner.down_proj, owner.down_proj_scale)
            parts = dict(zip(("gate_proj", "up_proj"), gate_up.chunk(2, dim=1), strict=True))
            for name, part in (parts | {"down_proj": down}).items():
                found |= {f"{prefix}.{e}.{name}": part[e] for e in range(len(part))}
        for leaf, linear in owner.named_children():
            if isinstance(linear, Linear) and linear.weight_scale is not None:
                wide = dequantised(linear.weight, linear.weight_scale)
                packing = Packing(leaf, {leaf: len(wide)})
                if isinstance(owner, PackedModule) and owner.packing.whole == leaf:
                    packing = owner.packing
                for part, rows in zip(packing.parts, packing.rows(wide), strict=True):
                    found[f"{prefix}.{part}"] = wide[rows]
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_loaded_as_it_is_stored(name, tmp_path):
    made = FORMATS[name]()
    model = load(made.write(tmp_path))
    found = in_memory(model)
    assert found.keys() == made.truth.keys()
    for module, expected in made.truth.items():
        assert torch.equal(found[module], expected), module
    norm, stored = model.model.norm.weight, made.tensors["model.norm.weight"]
    assert torch.equal(norm, stored.float())
    cache = model.allocate_cache(8)
    ids = torch.tensor([1, 2, 3])
    assert model(ids, cache.causal_step(3)).logits_TV.isfinite().all()


def test_static_scales_of_activations_reach_the_experts(tmp_path):
    made = FORMATS["compressed-tensors tensor"]()
    experts = experts_of(load(made.write(tmp_path)))
    assert experts.gate_up.input_scale is not None
    assert experts.down.input_scale is not None
    for e in range(3):
        gate, up, down = (
            made.tensors[f"model.layers.1.feed_forward.experts.{e}.{name}_proj.input_scale"]
            for name in ("gate", "up", "down")
        )
        assert torch.equal(experts.gate_up.input_scale[e : e + 1], torch.maximum(gate, up))
        assert torch.equal(experts.down.input_scale[e : e + 1], down)


def test_scales_of_fp8_caches_reach_their_layers(tmp_path):
    made = FORMATS["modelopt"]()
    model = load(made.write(tmp_path))
    for layer in range(2):
        prefix, scales = f"model.layers.{layer}.self_attn.", attention_of(model, layer).kv_scales
        assert scales.k_scale.item() == made.tensors[f"{prefix}k_proj.k_scale"].item()
        assert scales.v_scale.item() == made.tensors[f"{prefix}v_proj.v_scale"].item()


def test_fp8_linears_compute_with_the_dequantised_weights(tmp_path):
    """Rows of few activations are not quantised: against the weights widened, only rounding."""
    made = FORMATS["compressed-tensors channel"]()
    model = load(made.write(tmp_path))
    x = torch.randn(3, 160)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert f"model.layers.0.self_attn.{name}" in made.truth
    qkv = attention_of(model, 0).qkv_proj(x)
    wide = torch.cat([made.truth[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv"])
    torch.testing.assert_close(qkv.double(), x.double() @ wide.T, rtol=1e-5, atol=1e-5)


def change(made: Checkpoint, name: str, tensor: Tensor | None) -> Checkpoint:
    if tensor is None:
        del made.tensors[name]
    else:
        made.tensors[name] = tensor
    return made


SPOILT = {
    "no scale": ("channel", f"{UP}.weight_scale", None, "missing; FP8 codes mean nothing without"),
    "zero": ("tensor", f"{Q}.weight_scale", torch.zeros(1), "must be positive and finite"),
    "negative": ("tensor", f"{Q}.weight_scale", -torch.ones(1), "must be positive and finite"),
    "NaN": ("block", f"{Q}.weight_scale", torch.full((1, 2), torch.nan), "positive and finite"),
    "inf": ("modelopt", f"{FUSED}_weight_scale", torch.tensor(torch.inf), "positive and finite"),
    "input": ("modelopt", f"{FUSED}_input_scale", torch.tensor(0.0), "positive and finite"),
    "unused input": ("modelopt", f"{Q}.input_scale", torch.tensor(-1.0), "positive and finite"),
    "no input": ("modelopt", f"{FUSED}_input_scale", None, "missing"),
    "scale of bf16": (
        "fbgemm",
        f"{Q}.weight_scale",
        torch.ones(1),
        "no FP8 weight takes it, says the quantization_config",
    ),
    "bf16": ("channel", f"{Q}.weight", torch.ones(128, 160), "lists it as FP8"),
    "unlisted FP8": (
        "fbgemm",
        f"{Q}.weight",
        torch.ones(128, 160).to(FP8),
        "the quantization_config does not list it as FP8",
    ),
    "e5m2": (
        "channel",
        f"{Q}.weight",
        torch.ones(128, 160).to(torch.float8_e5m2),
        "torch.float8_e5m2, expected float8_e4m3fn",
    ),
    "fnuz": (
        "channel",
        f"{Q}.weight",
        torch.ones(128, 160).to(torch.float8_e4m3fnuz),
        "torch.float8_e4m3fnuz, expected float8_e4m3fn",
    ),
    "int8": ("channel", f"{UP}.weight", torch.ones(128, 160, dtype=torch.int8), "torch.int8"),
    "NaN code": (
        "channel",
        f"{UP}.weight",
        torch.full((128, 160), 0x7F, dtype=torch.uint8).view(FP8),
        "not finite in torch.float8_e4m3fn: 20480 of 20480",
    ),
    "transposed": ("channel", f"{UP}.weight", torch.ones(160, 128).to(FP8), "looks transposed"),
    "scale per group": ("channel", f"{UP}.weight_scale", torch.ones(128, 2), "shape (128, 2)"),
    "fused blocks": ("block", FUSED, torch.ones(3, 160, 256).to(FP8), "unexpected"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_rejects_tensors(case, tmp_path):
    name, tensor_name, tensor, expected = SPOILT[case]
    made = next(build for key, build in FORMATS.items() if key.endswith(name))()
    folder = change(made, tensor_name, tensor).write(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    line = next(line for line in str(error.value).splitlines() if tensor_name in line)
    assert expected in line


GROUP = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
CONFIGS = {
    "unknown": ({"quant_method": "gptq"}, "quant_method 'gptq' is not read; supported are FP8"),
    "no method": ({}, "quant_method None is not read"),
    "w4a16": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": {"weights": {"type": "int", "num_bits": 4}}},
        },
        "weights {'type': 'int', 'num_bits': 4, 'symmetric': None} is not read",
    ),
    "packed": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": GROUP},
        },
        "format 'pack-quantized' is not read",
    ),
    "NVFP4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "quant_algo 'NVFP4' is not read",
    ),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2' is not read"),
    "blocks": (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        "weight_block_size [64, 64]",
    ),
    "ue8m0": ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0' is not read"),
    "group scales": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": GROUP | {"weights": GROUP["weights"] | {"strategy": "group"}}},
        },
        "weights.strategy 'group' is not read",
    ),
    "stalling pattern": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": GROUP},
            "ignore": ["re:(.*)*x"],
        },
        "repeats a group; name the modules instead",
    ),
    "half a matrix": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": GROUP},
            "ignore": ["re:.*k_proj"],
        },
        "parts that are one matrix in memory must be quantised alike",
    ),
    "a quantised router": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"g": GROUP},
            "ignore": ["lm_head"],
        },
        "feed_forward.router' must be ignored: routers stay unquantised",
    ),
    "not an object": ("fp8", "must be an object"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_rejects_config(case, tmp_path):
    config, expected = CONFIGS[case]
    made = FORMATS["compressed-tensors channel"]()
    made.config = config
    with pytest.raises(CheckpointError) as error:
        load(made.write(tmp_path))
    assert expected in str(error.value)


def test_fp8_tensors_without_any_config(tmp_path):
    folder = FORMATS["compressed-tensors channel"]().write(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert f"{Q}.weight: torch.float8_e4m3fn, expected float16" in str(error.value)
    assert f"{Q}.weight_scale: unexpected" in str(error.value)


def test_modelopt_file_of_its_own(tmp_path):
    folder = FORMATS["modelopt"]().write(tmp_path)
    values = json.loads((folder / "config.json").read_text())
    own = values.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    assert experts_of(load(folder)).is_fp8
    own["quant_algo"] = None  # ModelOpt's way to say "not quantised"
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    with pytest.raises(CheckpointError, match="does not list it as FP8"):
        load(folder)


def test_refuses_to_quantise_twice(tmp_path):
    folder = FORMATS["fbgemm"]().write(tmp_path)
    with pytest.raises(CheckpointError, match="is quantised already"):
        load(folder, quantize="fp8")


@pytest.mark.parametrize("name", ["compressed-tensors channel", "modelopt"])
def test_triton_runs_fp8_models_as_eager_does(name, tmp_path, device):
    folder, ids, logits = FORMATS[name]().write(tmp_path), torch.tensor([1, 2, 3]).to(device), []
    for backend in ("eager", "triton"):
        model = load(folder, backend, device)
        logits.append(model(ids, model.allocate_cache(8).causal_step(3)).logits_TV)
    assert (logits[0] - logits[1]).norm() <= 1e-5 * logits[0].norm()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_meets_codes(backend, tmp_path, monkeypatch, device):
    """In prompts all FP8 linears but the head, in rounds none. The numbers are those of `Linear`
    and `MLP` (tests of these): through layers a sum's last bit becomes another code, and grows."""
    folder, met, of_codes = (
        FORMATS["compressed-tensors channel"]().write(tmp_path),
        set(),
        Linear.of_codes,
    )
    model = load(folder, backend, device)
    names = {module: name for name, module in model.named_modules()}

    def noted(self, *arguments):
        met.add(names[self])
        return of_codes(self, *arguments)

    monkeypatch.setattr(Linear, "of_codes", noted)
    ids = torch.tensor([1, 2, 3]).to(device)
    monkeypatch.setattr(scaled_linear, "STREAMED_ROWS", 2)
    model(ids, model.allocate_cache(8, 2).causal_step(2, 1))  # of no sequence more than two
    assert met == set()
    model(ids, model.allocate_cache(8).causal_step(3))
    linears = {names[m]: m for m in model.modules() if isinstance(m, Linear)}
    assert met == {n for n, m in linears.items() if m.row_codes != "none"} - {"lm_head"}

    assert len(met) == 8
