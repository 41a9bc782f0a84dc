"""A target cut over two and four gloo ranks writes what one process writes, and all of them it.

Regimes: random models (one and two key/value heads, so that heads are split and repeated; widths
and a vocabulary that the ranks do not divide; experts by width and dealt out; several files), the
draft on rank 0 and cut; chains, static and dynamic trees, thresholds, cost-aware width; greedy and
every sampling rule; ends inside a burst; ragged batches; the embedded pair; seeds that are drawn;
the Triton backend; taps that are the same bits on all ranks; what only one rank knows.

float32 sums in another order differ in their last bits, so a near tie of the whole model may go the
other way; where that happens all ranks go it together. These seeds have none.
"""

import gc
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import TopKLogitsWarper

from aerie.eagle3.communication_plan import round_traffic
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.eagle3.parallel_draft import RemoteDraft, load_parallel_draft
from aerie.eagle3.policies import Chain
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.streams import Generation
from aerie.embedded import DRAFT, TARGET
from aerie.llama4.config import Llama4Config
from aerie.llama4.model import Llama4ForCausalLM
from aerie.text import load_tokenizer
from tests.test_lossless import random_prompt, randomise
from tests.test_policies import random_policy
from tests.test_sampled_lossless import random_params

VOCAB = 33
NUMBERS = 64  # bytes
CASES = {2: 8, 4: 2}  # by ranks; a collective waits for every rank's turn on a busy machine


def target_values(choose: random.Random) -> dict[str, Any]:
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 22,
        "intermediate_size_mlp": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": choose.choice([4, 8]),
        "num_key_value_heads": choose.choice([1, 2]),
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": choose.choice([1, 1, 2]),
        "interleave_moe_layer_step": choose.choice([1, 2]),
        "attention_chunk_size": 16,
        "use_qk_norm": choose.choice([True, False]),
        "floor_scale": choose.choice([8, 8192]),
        "no_rope_layer_interval": choose.choice([2, 4]),
        "max_position_embeddings": 160,
    }


def draft_values(choose: random.Random) -> dict[str, Any]:
    return {
        "architectures": [choose.choice(["LlamaForCausalLMEagle3", "Eagle3Llama4ForCausalLM"])],
        "vocab_size": VOCAB,
        "draft_vocab_size": choose.choice([20, VOCAB]),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": choose.choice([1, 2]),
        "head_dim": 16,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]},
    }


def save(folder: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")


def write_pair(folder: Path, seed: int) -> None:
    """A random target and draft; a draft without a head or with an embedding now and then."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    values = target_values(choose)
    target = Llama4ForCausalLM(Llama4Config.from_hf(values), "eager")
    randomise(target)
    save(folder / "target", values, target.state_dict())
    values = draft_values(choose)
    width, size = 32, values["draft_vocab_size"]
    tensors = {
        "fc.weight": (width, 3 * width),
        "midlayer.self_attn.q_proj.weight": (64, 2 * width),
        "midlayer.self_attn.k_proj.weight": (16 * values["num_key_value_heads"], 2 * width),
        "midlayer.self_attn.v_proj.weight": (16 * values["num_key_value_heads"], 2 * width),
        "midlayer.self_attn.o_proj.weight": (width, 64),
        "midlayer.mlp.gate_proj.weight": (40, width),
        "midlayer.mlp.up_proj.weight": (40, width),
        "midlayer.mlp.down_proj.weight": (width, 40),
        "lm_head.weight": (size, width),
    }
    made = {name: torch.randn(shape) * 0.3 for name, shape in tensors.items()}
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        made[f"midlayer.{norm}.weight"] = 1 + 0.3 * torch.randn(width)
    made["norm.weight"] = 1 + 0.3 * torch.randn(width)
    if size < VOCAB:
        made["d2t"] = torch.randperm(VOCAB)[:size].sort().values - torch.arange(size)
    elif choose.random() < 0.5:
        del made["lm_head.weight"]
    if choose.random() < 0.3:
        made["embed_tokens.weight"] = torch.randn(VOCAB, width)
    save(folder / "draft", values, made)


def written(result: Generation) -> tuple:
    """What must be the same everywhere."""
    return result.tokens, result.finish_reason, result.stats.num_target_passes, result.seed


def random_cases(group, folder: str, seeds: range) -> list[tuple]:
    """Every case on the ranks; rank 0 also decodes it alone, without a draft."""
    outcomes, rank = [], dist.get_rank(group)
    for seed in seeds:
        choose, pair = random.Random(seed), Path(folder) / str(seed)
        if rank == 0:
            write_pair(pair, seed)
        dist.barrier(group)
        target = Llama4ForCausalLM.from_pretrained(
            pair / "target", backend="eager", group=group, expert_parallel=seed % 3 == 2
        )
        assert target.communicator is not None
        size = choose.choice([1, target.communicator.shard.size])
        draft = load_parallel_draft(pair / "draft", target, tensor_parallel_size=size)
        assert isinstance(draft, RemoteDraft) == (size == 1 and rank > 0)
        policy, params = random_policy(choose), random_params(choose)
        prompt, ends = random_prompt(seed), tuple(choose.sample(range(VOCAB), 2))
        options = {"sampling": params, "eos_token_ids": ends}
        result = generate(target, prompt, 24, draft, policy=policy, **options)
        alone = None
        if rank == 0:
            whole = Llama4ForCausalLM.from_pretrained(pair / "target", backend="eager")
            alone = generate(whole, prompt, 24, **options)
        outcomes.append((seed, written(result), alone and alone.tokens))
    return outcomes


def test_random_models_policies_and_samplers(ranks, tmp_path):
    seeds = range(100 * ranks.size, 100 * ranks.size + CASES[ranks.size])
    check(ranks(random_cases, str(tmp_path), seeds))


def check(per_rank: list[list[tuple]]) -> None:
    """All ranks wrote the same, and what one process wrote."""
    for outcomes in zip(*per_rank, strict=True):
        (seed, first, alone), *others = outcomes
        assert all(other[1] == first for other in others), f"seed {seed}: the ranks differ"
        assert first[0] == alone, f"seed {seed}"


def tensor_bytes() -> int:
    """Of all tensors that are alive in this process, storages counted once; but for numbers, which
    gloo's threads hold on to for a while after the ranks have agreed on them."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and not x.is_meta]
    sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(size for size in sizes.values() if size > NUMBERS)


def embedded_bytes(group, draft_size: int) -> tuple[int, int]:
    """What loading the embedded target, and then its draft, adds to a rank's memory."""
    before = tensor_bytes()
    target = Llama4ForCausalLM.from_pretrained(TARGET, backend="eager", group=group)
    between = tensor_bytes()
    draft = load_parallel_draft(DRAFT, target, tensor_parallel_size=draft_size)
    after = tensor_bytes()
    assert draft.is_bound_to(target)
    return between - before, after - between


def test_who_holds_what(two_ranks):
    """The verifier is cut; a draft of size 1 lies on rank 0 alone, of size 2 on both."""
    whole = Llama4ForCausalLM.from_pretrained(TARGET, backend="eager")
    target_bytes = sum(parameter.nbytes for parameter in whole.parameters())
    draft = Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, whole)
    draft_bytes = sum(parameter.nbytes for parameter in draft.parameters())
    embedding = whole.model.embed_tokens.weight.nbytes
    (first, alone), (second, nothing) = two_ranks(embedded_bytes, 1)
    assert max(first, second) < 0.53 * target_bytes  # norms and routers are on both
    assert draft_bytes <= alone - embedding < 1.01 * draft_bytes + 10_000
    assert nothing == 0
    (_, one), (_, other) = two_ranks(embedded_bytes, 2)
    assert one == other < 0.75 * draft_bytes  # fc is whole on both


def embedded_texts(group, prompts: list[list[int]], draft_size: int) -> list[tuple]:
    target = Llama4ForCausalLM.from_pretrained(TARGET, backend="eager", group=group)
    draft = load_parallel_draft(DRAFT, target, tensor_parallel_size=draft_size)
    batch = generate(target, prompts, 20, draft, sampling=SamplingParams(0.8, seed=5))
    return [written(result) for result in batch]


def test_embedded_pair_in_a_ragged_batch(two_ranks):
    """Sampled, prompts of several lengths side by side; the draft is as good as in one process."""
    tokenizer, whole = load_tokenizer(TARGET), Llama4ForCausalLM.from_pretrained(TARGET)
    texts = ["The with statement", "A class", "If the", "Lists may be constructed in several ways"]
    prompts = [tokenizer.encode(text).ids for text in texts]
    draft = Eagle3Llama4ForCausalLM.from_pretrained(DRAFT, whole)
    params = SamplingParams(0.8, seed=5)
    expected = [written(r) for r in generate(whole, prompts, 20, draft, sampling=params)]
    for draft_size in (1, 2):
        for results in two_ranks(embedded_texts, prompts, draft_size):
            assert results == expected


def loading_error(group, folder: str) -> str:
    try:
        Llama4ForCausalLM.from_pretrained(folder, backend="eager", group=group)
    except ValueError as error:
        return str(error)
    return ""


def test_what_one_rank_cannot_load_none_does(two_ranks, tmp_path):
    write_pair(tmp_path, 1)
    file = tmp_path / "target" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.o_proj.weight"][3, -1] = torch.nan
    save_file(tensors, file)
    first, second = two_ranks(loading_error, str(tmp_path / "target"))
    assert "o_proj.weight: not finite" in second
    assert first == f"rank 1: {second}"


def refused(group, folder: str) -> list[str]:
    """Sentences for what a cut target does not do; the same on all ranks, and nobody waits."""
    target = Llama4ForCausalLM.from_pretrained(f"{folder}/target", backend="eager", group=group)
    draft = load_parallel_draft(f"{folder}/draft", target)
    said = []
    for options in (
        {"sampling": SamplingParams(logits_processors=[TopKLogitsWarper(3)])},
        {"policy": Chain(2, verification="rejection")},
    ):
        with pytest.raises(ValueError, match="cut over ranks") as caught:
            generate(target, [1, 2], 4, draft, **options)
        said.append(str(caught.value))
    with pytest.raises(ValueError, match="draft_tensor_parallel_size: must be 1 or 2") as caught:
        load_parallel_draft(f"{folder}/draft", target, tensor_parallel_size=3)
    return [*said, str(caught.value)]


def test_refusals(two_ranks, tmp_path):
    write_pair(tmp_path, 1)
    first, second = two_ranks(refused, str(tmp_path))
    assert first == second


def drawn_seed(group, folder: str) -> tuple:
    target = Llama4ForCausalLM.from_pretrained(folder, backend="eager", group=group)
    torch.manual_seed(dist.get_rank(group))
    return written(generate(target, [1, 2, 3], 8, sampling=SamplingParams(1.0), eos_token_ids=()))


def test_a_seed_is_drawn_once(two_ranks, tmp_path):
    write_pair(tmp_path, 1)
    first, second = two_ranks(drawn_seed, str(tmp_path / "target"))
    assert first == second
    assert first[3] is not None


def taps(group, folder: str) -> list[bytes]:
    target = Llama4ForCausalLM.from_pretrained(folder, backend="eager", group=group)
    target.set_aux_hidden_state_layers((0, 2, 4))
    ids = torch.tensor([5, 32, 1, 7])
    output = target(ids, target.allocate_cache(8).causal_step(4))
    return [tap_TD.numpy().tobytes() for tap_TD in output.aux_hidden_states]


def test_taps_are_the_same_bits_on_all_ranks(ranks, tmp_path):
    write_pair(tmp_path, 1)
    first, *others = ranks(taps, str(tmp_path / "target"))
    assert all(other == first for other in others)


def taps_of_mesh(group, folder: str) -> list[bytes]:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size(group)), mesh_dim_names=("dp", "tp"))
    with pytest.raises(
        ValueError, match=r"a mesh must have one dimension, got 2; give mesh\['tp'\]"
    ):
        Llama4ForCausalLM.from_pretrained(folder, backend="eager", group=mesh)
    return taps(mesh["tp"], folder)


def test_a_mesh_is_its_group(two_ranks, tmp_path):
    write_pair(tmp_path, 1)
    folder = str(tmp_path / "target")
    assert two_ranks(taps_of_mesh, folder) == two_ranks(taps, folder)


def interpreted(group, folder: str) -> list[int]:
    target = Llama4ForCausalLM.from_pretrained(folder, backend="triton", group=group)
    params = SamplingParams(1.0, top_p=0.9, seed=1)
    return generate(target, [5, 32], 1, eos_token_ids=(), sampling=params).tokens


def test_triton_backend(two_ranks, tmp_path):
    """The kernels in the interpreter."""
    write_pair(tmp_path, 1)
    whole = Llama4ForCausalLM.from_pretrained(tmp_path / "target", backend="eager")
    params = SamplingParams(1.0, top_p=0.9, seed=1)
    expected = generate(whole, [5, 32], 1, eos_token_ids=(), sampling=params).tokens
    assert two_ranks(interpreted, str(tmp_path / "target")) == [expected] * 2


def traffic(group, draft_size: int) -> tuple[int, int, int]:
    """Calls and bytes of the collectives of a greedy chain of 3, and the rounds it took."""
    target = Llama4ForCausalLM.from_pretrained(TARGET, backend="eager", group=group)
    draft = load_parallel_draft(DRAFT, target, tensor_parallel_size=draft_size)
    sizes: list[int] = []

    def counted(collective, at: int):
        def call(*arguments, **options):
            sizes.append(arguments[at].nbytes)
            return collective(*arguments, **options)

        return call

    originals = dist.all_reduce, dist.broadcast, dist.all_gather
    dist.all_reduce, dist.broadcast = counted(dist.all_reduce, 0), counted(dist.broadcast, 0)
    dist.all_gather = counted(dist.all_gather, 1)
    try:
        result = generate(target, [7], 16, draft, 3, eos_token_ids=())
    finally:
        dist.all_reduce, dist.broadcast, dist.all_gather = originals
    return len(sizes), sum(sizes), result.stats.num_target_passes - 1


@pytest.mark.parametrize("draft_size", [1, 2])
def test_a_round_tells_what_the_plan_says(two_ranks, draft_size):
    config = Llama4Config.from_pretrained(TARGET)
    draft = Eagle3Config.from_pretrained(DRAFT, config.num_hidden_layers)
    shape = {"itemsize": 4, "batch": 1, "draft_size": draft_size}
    plan = round_traffic(config, draft, num_drafted=3, depth=3, **shape).values()
    prompt = round_traffic(config, None, num_drafted=0, depth=0, **shape).values()
    for calls, nbytes, rounds in two_ranks(traffic, draft_size):
        assert calls == sum(t.calls for t in prompt) + rounds * sum(t.calls for t in plan)
        planned = sum(t.nbytes for t in prompt) + rounds * sum(t.nbytes for t in plan)
        most_rows_of_a_draft = 0 if draft_size == 1 else 3 * 3 * 128 * 4  # of the first round
        assert planned - most_rows_of_a_draft <= nbytes <= planned
