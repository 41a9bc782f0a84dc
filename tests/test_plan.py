"""`aerie plan`, and its numbers at the start of `generate`: what fits runs, the rest is refused.

The numbers themselves are tested against real allocations in tests/eagle3/test_memory_plan.py.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from aerie import batch_run, loading
from aerie.cli import app
from aerie.eagle3.registry import load_draft
from aerie.embedded import DRAFT, TARGET
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.sharding import Shard
from aerie.plan import make_planner
from aerie.request import check_can_capture
from tests.eagle3.test_memory_plan import MAVERICK, SCOUT, bytes_of
from tests.llama4.test_sharding import load_rank

GENERATE = ("generate", "--prompt", "A class", "--max-new-tokens", "3", "--json")


def aerie(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def config_only(tmp_path):
    """`config_only(values)`: a folder that holds nothing but a config."""

    def write(values: dict):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


def test_the_embedded_pair():
    found = json.loads(aerie("plan", "--json", "--dtype", "float32").stdout)
    target = Llama4ForCausalLM.from_pretrained(TARGET)
    assert sum(found["target_weights"].values()) == bytes_of(target)
    assert sum(found["draft_weights"].values()) == bytes_of(load_draft(DRAFT, target))
    assert (found["context"], found["batch"], found["memory"]) == (1024, 1, None)
    weights = sum(found["target_weights"].values()) + sum(found["draft_weights"].values())
    caches = found["kv_full"] + found["kv_chunked"] + found["kv_draft"] + found["page_tables"]
    assert found["total"] == weights + caches + found["columns"] + found["activations"]
    assert found["cuda_graphs"] == 0
    graphed = json.loads(aerie("plan", "--json", "--dtype", "float32", "--cuda-graphs").stdout)
    assert graphed["total"] == found["total"] + graphed["cuda_graphs"]
    # PyTorch takes 2 MiB from CUDA for small tensors and 20 for others, however small the model
    assert graphed["cuda_graphs"] > 22 * 2**20
    assert "at most" in aerie("plan", "--cuda-graphs").stdout
    for config in ({"confidence_threshold": 0.5}, {"cost_aware_width": "measured"}):
        own = ("--json", "--cuda-graphs", "--speculative-config", json.dumps(config))
        assert json.loads(aerie("plan", *own).stdout)["cuda_graphs"] == 0  # no two rounds are alike


def test_scout_from_its_config_alone(config_only):
    folder = config_only(SCOUT)
    fits = aerie("plan", "--model", folder, "--quantize", "fp8", "--memory", 139)
    assert fits.exit_code == 0
    assert "110.80 GiB" in fits.stdout
    refused = aerie("plan", "--model", folder, "--memory", 139, "--json")
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["memory"] == 139 * 2**30
    assert "not even one token fits beside weights of 200.7" in refused.stderr


def test_what_would_fit_is_named(config_only):
    asked = ("--context", 10**6, "--batch", 2, "--memory", 460)
    folder = config_only(MAVERICK)
    result = aerie("plan", "--model", folder, "--quantize", "fp8", *asked)
    assert result.exit_code == 2
    found = " ".join(result.stderr.split())
    context = int(found.split("what fits is ")[1].split()[0])
    smaller = ("--context", context, "--batch", 2, "--memory", 460)
    assert "a batch of 1 at 1000000 tokens" in found
    assert (
        aerie("plan", "--model", config_only(MAVERICK), "--quantize", "fp8", *smaller).exit_code
        == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", 0), "--memory: must be a positive number of GiB"),
        (("--memory", "nan"), "--memory: must be a positive number of GiB"),
        (("--context", 1025), "must be 1..1024 tokens"),
        (("--batch", 0), "at least 1 sequence"),
        (("--revision", "main"), "revision: pins hub ids"),
        (("--speculative-config", '{"revision": ""}'), "revision: must be a commit, tag or branch"),
        (
            ("--draft-revision", "a", "--speculative-config", '{"revision": "b"}'),
            "pin one draft",
        ),
    ],
    ids=str,
)
def test_refuses(options, message):
    result = aerie("plan", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_generate_says_its_memory_before_it_loads():
    result = aerie(*GENERATE)
    assert result.exit_code == 0
    assert "memory: 16." in result.stderr
    assert "MiB for 6 tokens x 1 (target 14.52 MiB, draft 1.73 MiB, KV full" in result.stderr


def test_generate_refuses_before_it_loads(monkeypatch):
    def load(*_: object) -> None:
        raise AssertionError("was loaded")

    monkeypatch.setattr(loading, "load_target", load)
    monkeypatch.setattr(loading, "free_memory", lambda device: 10 * 2**20)
    result = aerie(*GENERATE)
    assert result.exit_code == 2
    assert "what cpu has left is 0.01 GiB; not even one token fits beside weights" in result.stderr
    assert result.stdout == ""


def test_free_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert loading.free_memory(torch.device("cuda:1")) == 7
    assert loading.free_memory(torch.device("cpu")) is None


def test_a_share_of_the_memory_bounds_caches_and_lets_prompts_wait(monkeypatch, tmp_path):
    """On a host that would hold the weights and two of three texts."""
    (tmp_path / "prompts").write_text("The with statement\nA class\nimport os")
    asked = ("--max-new-tokens", 3, "--json", "--prompt-file", tmp_path / "prompts", "--lines")
    seen, decodings = [], batch_run.Decodings
    monkeypatch.setattr(
        batch_run, "Decodings", lambda *given: seen.append(decodings(*given)) or seen[-1]
    )
    free = aerie("generate", *asked)
    page = sum(
        2 * pool.k_LRCGK[:, :1].nbytes for cache in seen[0].rows.caches for pool in cache.pools
    )
    plan = make_planner(TARGET, DRAFT, dtype=torch.float32, backend="eager").plan(9, 3)
    rest = plan.total - plan.keys_and_values
    monkeypatch.setattr(loading, "total_memory", lambda device: 2 * (rest + 2 * page + 100))
    bounded = aerie("generate", *asked, "--memory-fraction", 0.5)
    assert bounded.exit_code == 0, bounded.stderr
    assert seen[0].rows.cache.pools[0].num_pages == 3
    assert seen[1].rows.cache.pools[0].num_pages == 2
    texts = [[one["token_ids"] for one in json.loads(run.stdout)] for run in (free, bounded)]
    assert texts[0] == texts[1]


def test_a_share_that_holds_not_one_text_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(loading, "load_target", None)
    monkeypatch.setattr(loading, "total_memory", lambda device: 24 * 2**20)
    refused = aerie(*GENERATE, "--memory-fraction", 0.5)
    assert refused.exit_code == 2
    assert "--memory-fraction 0.5 of 0.02 GiB is 0.01 GiB" in " ".join(refused.stderr.split())
    assert refused.stdout == ""


def test_what_a_gpu_has_left_bounds_a_share_too(monkeypatch):
    monkeypatch.setattr(loading, "total_memory", lambda device: 2**40)
    monkeypatch.setattr(loading, "free_memory", lambda device: 10 * 2**20)
    refused = aerie(*GENERATE, "--memory-fraction", 0.5)
    assert refused.exit_code == 2
    assert "what cpu has left is 0.01 GiB" in refused.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_total_memory(device, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=5)
    )
    total = loading.total_memory(torch.device(device))
    assert total == 5 if device == "cuda:1" else total > 2**28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory-fraction", 0), "--memory-fraction: must be in (0, 1], got 0.0"),
        (("--memory-fraction", 1.1), "--memory-fraction: must be in (0, 1], got 1.1"),
        (("--memory-fraction", "nan"), "--memory-fraction: must be in (0, 1], got nan"),
        (("--cuda-graphs",), "--cuda-graphs: needs a GPU, the device is cpu; leave the option out"),
    ],
    ids=str,
)
def test_generate_refuses_budgets(options, message):
    refused = aerie(*GENERATE, "--device", "cpu", *options)
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.split())
    assert refused.stdout == ""


def test_graphs_that_are_asked_for_are_never_left_out_silently(monkeypatch):
    """Not even where none is planned: here what finds no GPU is the capture itself."""
    monkeypatch.setattr("aerie.commands.generate_options.check_can_capture", lambda *_: None)
    stops = json.dumps({"confidence_threshold": 0.5})
    asked = (*GENERATE, "--device", "cpu", "--cuda-graphs", "--speculative-config", stops)
    refused = aerie(*asked)
    assert refused.exit_code == 2
    assert "cuda_graph_bytes: needs a GPU, got cpu" in refused.stderr
    assert refused.stdout == ""


def test_graphs_of_a_plan_are_of_one_rank_on_triton():
    refused = aerie("plan", "--cuda-graphs", "--tensor-parallel-size", 2)
    assert refused.exit_code == 2
    assert "--cuda-graphs: a round of several ranks" in " ".join(refused.stderr.split())
    with pytest.raises(ValueError, match="--cuda-graphs: needs Triton's backend, got 'eager'"):
        check_can_capture(torch.device("cuda"), "eager", 1)
    check_can_capture(torch.device("cuda"), "auto", 1)


@pytest.mark.parametrize("has_tensors", [True, False])
def test_a_vision_tower_counts_in_its_own_dtype(has_tensors, tmp_path):
    """transformers is imported here: nothing else of this file needs it."""
    from aerie.assets.tiny_multimodal.checkpoint import new_model, save
    from aerie.llama4.multimodal_config import MultimodalConfig
    from aerie.llama4.vision import VisionTower

    folder = save(new_model(), tmp_path)
    tower = VisionTower.from_pretrained(folder, MultimodalConfig.from_pretrained(folder), "cpu")
    if not has_tensors:
        (folder / "model.safetensors").unlink()
    dtype = "bfloat16" if has_tensors else "float32"  # the files' own is float32
    found = json.loads(aerie("plan", "--model", folder, "--dtype", dtype, "--json").stdout)
    assert found["target_weights"]["vision"] == bytes_of(tower)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two(rank):
    """Its weights are those that a rank loads; the draft and the whole embedding lie on rank 0."""
    shard = Shard(rank, 2)
    planner = make_planner(TARGET, DRAFT, dtype=torch.float32, backend="eager", shard=shard)
    loaded = load_rank(TARGET, shard)
    held = sum(x.nbytes for x in (*loaded.parameters(), *loaded.buffers()))
    assert sum(planner.target_weights.values()) == held
    embedding = 1024 * 128 * 4
    assert planner.draft_weights.get("embedding", 0) == (embedding if rank == 0 else 0)
    assert bool(planner.draft_weights) == (rank == 0)


def test_traffic_is_shown():
    options = ["plan", "--tensor-parallel-size", "2", "--json"]
    told = json.loads(CliRunner().invoke(app, options).stdout)["communication"]
    assert told["attention"] == {"calls": 12, "bytes": 12 * 5 * 128 * 2}
    refused = CliRunner().invoke(app, ["plan", "--tensor-parallel-size", "3"])
    assert refused.exit_code == 2
    assert "one of 1, 2, 5, 10; got 3" in refused.stderr
