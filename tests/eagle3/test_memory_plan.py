"""Planned bytes are those that loading and decoding really allocate; what fits is found exactly."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aerie.eagle3 import round_memory, rows
from aerie.eagle3.checkpoint import OwnParts
from aerie.eagle3.choice_form import EVERY_FILTER, NO_RULES, ChoiceForm, RuleForm
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.memory_plan import GIB, MemoryPlanner, activations
from aerie.eagle3.planned_pair import DraftPlan, Run
from aerie.eagle3.policies import Chain, DynamicTree, Policy
from aerie.eagle3.reading import Reading
from aerie.eagle3.registry import load_draft
from aerie.eagle3.round_memory import GRAPH_MARGIN, SEGMENTS, round_bytes
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.config import Llama4Config
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.live_memory import LiveMemory
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.quantization import quantization
from aerie.plan import make_planner
from tests.eagle3.conftest import TARGET, CheckpointFiles, random_weights, with_changes
from tests.llama4.fp8_files import FORMATS

FP8 = torch.float8_e4m3fn
SCOUT = {  # contract.md, 2.1
    "model_type": "llama4_text",
    "vocab_size": 202048,
    "hidden_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "max_position_embeddings": 10485760,
}
MAVERICK = SCOUT | {
    "num_local_experts": 128,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "max_position_embeddings": 1048576,
}
HEAD = {  # contract.md, 3.1: SpecForge's for Scout
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 202048,
    "draft_vocab_size": 32000,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 1,
}
EAGER = Run(torch.float32, torch.float32, backend="eager")


def bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def bytes_of_named(module: torch.nn.Module, part: str) -> int:
    return sum(tensor.nbytes for name, tensor in module.named_parameters() if part in name)


def cache_bytes(cache: PagedKVCache) -> int:
    tensors = [t for p in cache.pools for t in (p.k_LRCGK, p.v_LRCGK, p.page_table_BM, p.slots_BS)]
    return sum(tensor.nbytes for tensor in tensors)


def planner(values: dict, run: Run = EAGER, draft: DraftPlan | None = None) -> MemoryPlanner:
    return MemoryPlanner(Llama4Config.from_hf(values), draft, run)


def write_target(folder: Path, **changes) -> Path:
    values = with_changes(TARGET, changes)
    with torch.device("meta"):
        empty = Llama4ForCausalLM(Llama4Config.from_hf(values))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    if values.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    return CheckpointFiles(values, random_weights(shapes)).write(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [None, "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_targets(tied, quantize, dtype, tmp_path):
    changes = {"moe_layers": [1, 3], "tie_word_embeddings": tied, "attention_bias": True}
    folder = write_target(tmp_path / "target", **changes)
    options = {"quantize": quantize, "quantize_linears": quantize is not None}
    target = Llama4ForCausalLM.from_pretrained(folder, dtype, **options)
    made = make_planner(folder, None, dtype=dtype, backend="eager", **options)
    assert sum(made.target_weights.values()) == bytes_of(target)
    assert made.target_weights["routed experts"] == bytes_of_named(target, ".experts.")


@pytest.mark.parametrize("name", FORMATS)
def test_weights_of_fp8_formats(name, tmp_path):
    folder = FORMATS[name]().write(tmp_path)
    target = Llama4ForCausalLM.from_pretrained(folder, torch.bfloat16)
    made = make_planner(folder, None, dtype=torch.bfloat16, backend="eager")
    assert sum(made.target_weights.values()) == bytes_of(target)


DRAFTS = {
    "reduced": {},
    "full vocabulary": {"draft_vocab_size": None},
    "three norms": {"fc_norm": True, "norm_output": True},
    "llama4": {"kind": "llama4", "attention_bias": True},
}


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("case", DRAFTS)
def test_weights_of_drafts(case, embedding, draft_files, make_target, tmp_path):
    changes = dict(DRAFTS[case])
    files = draft_files(changes.pop("kind", "llama"), **changes)
    if embedding:
        files.tensors["embed_tokens.weight"] = torch.randn(96, 40)
    folder = files.write(tmp_path / "draft")
    draft = load_draft(folder, make_target())
    made = make_planner(
        write_target(tmp_path / "target"), folder, dtype=torch.float32, backend="eager"
    )
    assert sum(made.draft_weights.values()) == bytes_of(draft)
    assert ("embedding" in made.draft_weights) == embedding


def test_a_head_cut_from_the_targets_is_the_drafts_own(draft_files, make_target, tmp_path):
    files = draft_files("llama")
    del files.tensors["lm_head.weight"]
    folder, reading = files.write(tmp_path / "draft"), Reading(lm_head="target")
    draft = load_draft(folder, make_target(), reading=reading)
    speculation = SpeculativeConfig(reading=reading)
    target = write_target(tmp_path / "target")
    made = make_planner(
        target, folder, dtype=torch.float32, speculation=speculation, backend="eager"
    )
    assert made.draft_weights["head"] == draft.lm_head.weight.nbytes
    assert sum(made.draft_weights.values()) == bytes_of(draft) + draft.lm_head.weight.nbytes


def test_a_config_alone_gives_the_same_plan(draft_files, tmp_path):
    folders = write_target(tmp_path / "target"), draft_files("llama").write(tmp_path / "draft")
    whole = make_planner(*folders, dtype=torch.bfloat16, backend="eager").plan(100)
    for folder in folders:
        (folder / "model.safetensors").unlink()
    assert make_planner(*folders, dtype=torch.bfloat16, backend="eager").plan(100) == whole


def test_a_draft_of_another_target_is_refused(draft_files, tmp_path):
    target = write_target(tmp_path / "target")
    draft = draft_files("llama", vocab_size=95).write(tmp_path / "draft")
    with pytest.raises(CheckpointError, match="vocab_size 95 is not the target's 96"):
        make_planner(target, draft, dtype=torch.float32)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("context", [20, 1500, 5000])
def test_caches(context, kv_cache_dtype, batch):
    """The chunk of 16 makes rings of 1039 slots: longer contexts have two pools."""
    values = TARGET | {"max_position_embeddings": 8192}
    config = Llama4Config.from_hf(values)
    kv_dtype = FP8 if kv_cache_dtype == "fp8" else torch.float32
    planned = planner(values, replace(EAGER, kv_dtype=kv_dtype, policy=Chain(4))).plan(
        context, batch
    )
    target = Llama4ForCausalLM.without_values(config)
    cache = target.allocate_cache(context + 5, batch, kv_cache_dtype=kv_cache_dtype)
    assert planned.kv.total == cache_bytes(cache)
    chunked = {i for i in range(8) if config.attention(i).chunk_size is not None}
    layers = enumerate(cache.layers)
    real = sum(kv.k_RCGK.nbytes + kv.v_RCGK.nbytes for i, kv in layers if i in chunked)
    assert planned.kv.chunked == real


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("slots", [64, 65])
@pytest.mark.parametrize("policy", [Chain(3), DynamicTree(8, 4, 3)], ids=["chain", "tree"])
def test_caches_of_a_decoding(
    policy: Policy, slots, lag, draft_files, make_target, tmp_path, monkeypatch
):
    """On both sides of the edge of a page, which one row more or less would cross."""
    monkeypatch.setattr(rows, "lag_on", lambda device: lag)
    target, folder = make_target(), draft_files("llama").write(tmp_path / "draft")
    context = slots - policy.num_rows - 1 - lag * (policy.depth + 1)
    draft = load_draft(folder, target)
    decoding = Decoding(target, [1, 2, 3], context - 3, draft, policy=policy)
    config = Eagle3Config.from_pretrained(folder, 8)
    drafted = DraftPlan(config, OwnParts(embedding=False, head=True))
    run = replace(EAGER, policy=policy, lag=lag)
    planned = planner(TARGET, run, drafted).plan(context)
    of_target, of_draft = decoding.decodings.rows.caches
    assert planned.kv.total == cache_bytes(of_target)
    assert planned.draft_kv.total == cache_bytes(of_draft)
    assert of_target.pools[0].num_pages == -(-slots // 64)
    of_batch = decoding.decodings.rows.batch.columns
    of_rules = decoding.decodings.rows.sampler.rules.columns
    assert planned.columns == sum(column.nbytes for column in (*of_batch, *of_rules))


def test_live_memory_is_a_peak():
    x = torch.empty(100)
    with LiveMemory([x]) as live:
        y = x + 1  # 400 bytes
        z = y.view(10, 10).mT + y.view(10, 10)  # 800
        del y
        z = z * 2  # two of them
        del z
        x.add_(1)
    assert live.peak == 800
    with LiveMemory([]) as live:
        parts = [torch.ones(50) for _ in range(4)]
        del parts
        torch.ones(10)
    assert live.peak == 800


class Collected(LiveMemory):
    """Triton's interpreter leaves what it was given in cycles, for the collector to find."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gc.collect(1)
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_activations_are_what_a_real_pass_keeps(make_target, draft_files, tmp_path):
    """The same counting over real tensors, with Triton's operations interpreted."""
    folder = write_target(tmp_path / "target", moe_layers=[1, 3])
    target = Llama4ForCausalLM.from_pretrained(folder, backend="triton")
    cache, count = target.allocate_cache(8), 3
    target.set_aux_hidden_state_layers((2, 4, 5))
    step, ids = cache.causal_step(count), torch.tensor([5, 6, 7])
    stored = [t for pool in cache.pools for t in (pool.k_LRCGK, pool.v_LRCGK)]
    existing = [*target.parameters(), *target.buffers(), *stored]
    with torch.inference_mode(), Collected(existing) as live:
        target(ids, step)
    drafted = DraftPlan(
        Eagle3Config.from_pretrained(draft_files("llama").write(tmp_path / "draft"), 8),
        OwnParts(embedding=False, head=True),
    )
    run = Run(torch.float32, torch.float32, policy=Chain(count - 1))
    values = with_changes(TARGET, {"moe_layers": [1, 3]})
    assert activations(planner(values, run, drafted), count, True) == live.peak


def test_graphs_are_planned_by_what_a_real_round_keeps(
    draft_files, make_target, tmp_path, monkeypatch
):
    """The same counting over real tensors, with Triton's operations interpreted, which lets go of a
    norm's two inputs one operation late."""
    monkeypatch.setattr(round_memory, "LiveMemory", Collected)
    folder = write_target(tmp_path / "target", num_hidden_layers=4)
    changes = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}
    of_draft = draft_files("llama", **changes).write(tmp_path / "draft")
    target = Llama4ForCausalLM.from_pretrained(folder, backend="triton")
    draft, policy = load_draft(of_draft, target), Chain(2)
    made = make_planner(folder, of_draft, dtype=torch.float32, cuda_graphs=True)
    planned = []
    for rules in (NO_RULES, RuleForm(True, 2, 1, 3, True, True)):
        form = EVERY_FILTER | ChoiceForm(rules=rules)
        made = replace(made, run=replace(made.run, policy=policy, choice=form))
        planned.append(made.plan(20, 2).cuda_graphs // GRAPH_MARGIN - SEGMENTS)
        late = 2 * 2 * (1 + policy.num_rows) * TARGET["hidden_size"] * 4
        assert planned[-1] <= round_bytes(target, draft, policy, 2, form) <= planned[-1] + late
    assert planned[1] > planned[0] > 2 * 3 * TARGET["vocab_size"] * 4  # all rows' logits
    assert made.plan(20, 3).cuda_graphs > made.plan(20, 2).cuda_graphs
    with_none = replace(made, run=replace(made.run, has_graphs=False))
    assert with_none.plan(20, 2).cuda_graphs == 0


def test_what_a_budget_leaves_for_keys_and_values():
    made = planner(TARGET, replace(EAGER, policy=Chain(4)))
    plan, one = made.plan(100, 3), made.plan(100)
    rest = plan.total - plan.keys_and_values
    assert made.kv_cache_bytes(plan, rest + one.keys_and_values, "here") == one.keys_and_values
    with pytest.raises(ValueError, match="memory: 100 tokens x 3 need"):
        made.kv_cache_bytes(plan, rest + one.keys_and_values - 1, "here")


def test_scout():
    """Counts of contract.md, 2.8 and 3.1."""
    run = Run(torch.bfloat16, torch.bfloat16, policy=Chain(4), backend="eager")
    drafted = DraftPlan(Eagle3Config.from_hf(HEAD, 48), OwnParts(embedding=False, head=True))
    made = planner(SCOUT, run, drafted)
    weights = {name: nbytes / 2e9 for name, nbytes in made.target_weights.items()}
    assert weights["routed experts"] == pytest.approx(96.6, abs=0.05)
    assert weights["shared expert"] == pytest.approx(6.04, abs=0.005)
    assert weights["attention"] == pytest.approx(3.02, abs=0.005)
    assert weights["embedding"] + weights["head"] == pytest.approx(2.07, abs=0.005)
    assert sum(made.draft_weights.values()) == 2 * 845_434_880 + 8 * 32000 + 256
    plan = made.plan(131072)
    per_token = 4096 * 131072  # 4 KiB per token and layer
    assert plan.kv.full == pytest.approx(12 * per_token, rel=1e-3)
    assert (plan.kv.full + plan.kv.chunked) / GIB == pytest.approx(7.3, abs=0.05)


def test_maverick():
    run = Run(torch.bfloat16, torch.bfloat16, backend="eager")
    weights = planner(MAVERICK, run).target_weights
    assert sum(weights.values()) / 2e9 == pytest.approx(400.7, abs=0.05)


def test_scout_in_fp8_fits_one_large_gpu():
    """113 to 115 GB with its draft, says contract.md, 2.8."""
    quantised = quantization(
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head", "router", "self_attn"]}
    )
    run = Run(torch.bfloat16, torch.bfloat16, quantised, Chain(4))
    made = planner(SCOUT, run)
    assert 113e9 < sum(made.target_weights.values()) + 1.69e9 < 115e9
    memory = 139 * GIB
    context, batch = made.largest_context(memory, 2), made.largest_batch(memory, 8192)
    assert made.plan(context, 2).total <= memory < made.plan(context + 1, 2).total
    assert made.plan(8192, batch).total <= memory < made.plan(8192, batch + 1).total
    made.check(made.plan(context, 2), memory, "here")
    with pytest.raises(ValueError, match="memory: ") as error:
        made.check(made.plan(10**6, 2), memory, "here")
    assert f"what fits is {context} tokens of context at batch 2" in str(error.value)
    assert "a batch of" not in str(error.value)
    with pytest.raises(ValueError, match="not even one token fits beside weights of"):
        made.check(made.plan(1), 80 * GIB, "here")


@pytest.mark.parametrize(("context", "batch"), [(0, 1), (257, 1), (1, 0), (-5, 2)])
def test_refuses_what_the_target_cannot_be_asked(context, batch):
    with pytest.raises(ValueError, match=r"must be 1\.\.256 tokens and at least 1 sequence"):
        planner(TARGET).plan(context, batch)
