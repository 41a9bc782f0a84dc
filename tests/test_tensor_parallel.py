"""A target cut over two and four gloo ranks writes what one process writes, and all of them it.

Regimes: random models (one and two key/value heads, so that heads are split and repeated; widths
and a vocabulary that the ranks do not divide; experts by width and dealt out; several files), the
draft on rank 0 and cut; chains, static and dynamic trees, thresholds, cost-aware width; greedy and
every sampling rule; ends inside a burst; ragged batches; the embedded pair; seeds that are drawn;
the Triton backend; taps that are the same bits on all ranks; what only one rank knows.

float32 sums in another order differ in their last bits, so a near tie of the whole model may go the
other way: where ids differ, the first difference must be one (`MARGIN`), and few may.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from aerie.eagle3.generate import Generation, generate
from aerie.eagle3.parallel_draft import RemoteDraft, load_parallel_draft
from aerie.llama4.config import Llama4Config
from aerie.llama4.model import Llama4ForCausalLM
from tests.test_lossless import random_prompt, randomise
from tests.test_policies import random_policy
from tests.test_sampled_lossless import random_params

VOCAB = 33
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
