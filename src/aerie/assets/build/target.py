"""Training of the tiny Llama 4 target: transformers' own model on rows cut from the topics."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from aerie.assets.build import chunked_attention
from aerie.assets.build.router_balance import RouterBalance
from aerie.assets.build.schedule import cosine, line
from aerie.assets.build.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class TargetTraining:
    """Hyper-parameters of the shipped run."""

    steps: int = 1000
    rows: int = 6
    row_length: int = 384
    peak_lr: float = 3e-3
    final_lr: float = 1e-5
    warmup: int = 60
    # The shipped run set out on a cosine of 1700 steps and was brought down early, in a
    # straight line, because the machine turned out busier than planned.
    cosine_steps: int = 1700
    anneal_from: int = 685
    weight_decay: float = 0.05
    clip: float = 1.0
    # Top-1 routing starves experts early on; this keeps all of them in use.
    balance: float = 0.01


def target_config() -> Llama4TextConfig:
    """Llama 4 in small: NoPE, chunked attention, both feed-forward kinds, temperature tuning."""
    return Llama4TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=12,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        intermediate_size_mlp=384,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=4,
        attention_chunk_size=128,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        floor_scale=64,
        attn_scale=0.1,
        rope_parameters=_rope_parameters(),
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def _rope_parameters() -> dict[str, float | str]:
    # low == high is what Scout Instruct ships: the blending band is empty.
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }


class RowSampler:
    """Rows as a served model meets them: bos, then text that starts anywhere in a topic."""

    def __init__(self, topics: "Sequence[list[int]]", seed: int) -> None:
        self.topics = [torch.tensor([*ids, EOS_ID]) for ids in topics]
        self.sizes = torch.tensor([len(ids) for ids in topics], dtype=torch.float)
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, num_rows: int, length: int) -> torch.Tensor:
        """[num_rows, length] token ids."""
        return torch.stack([self._row(length) for _ in range(num_rows)])

    def _row(self, length: int) -> torch.Tensor:
        pieces, size = [], 0
        while size < length:
            piece = self._piece(from_start=bool(pieces))
            pieces.append(piece)
            size += len(piece)
        return torch.cat(pieces)[:length]

    def _piece(self, from_start: bool) -> torch.Tensor:
        topic = self.topics[int(torch.multinomial(self.sizes, 1, generator=self.generator))]
        start = 0
        if not from_start:
            start = int(torch.randint(len(topic), (1,), generator=self.generator))
        return torch.cat([torch.tensor([BOS_ID]), topic[start:]])


def target_rate(step: int, plan: TargetTraining) -> float:
    """The cosine up to `anneal_from`, then a straight line down to the final rate."""
    top = min(step, plan.anneal_from)
    rate = cosine(top, plan.cosine_steps, plan.warmup, plan.peak_lr, plan.final_lr)
    return line(step - top, plan.steps - 1 - plan.anneal_from, rate, plan.final_lr)


def train_target(
    topics: "Sequence[list[int]]", seed: int, device: str, plan: TargetTraining
) -> Llama4ForCausalLM:
    """A trained target whose float32 weights are exactly representable in bfloat16."""
    torch.manual_seed(seed)
    model = Llama4ForCausalLM(target_config()).train()
    place(model, device)
    model.set_attn_implementation(chunked_attention.register())
    # Adam's moments of rarely used weights decay into denormals, which are slow on a CPU.
    torch.set_flush_denormal(True)
    balance = RouterBalance(model)
    optimizer = _optimizer(model, plan)
    sampler = RowSampler(topics, seed)
    started = time.monotonic()
    for step in range(plan.steps):
        rate = target_rate(step, plan)
        ids_BT = sampler.rows(plan.rows, plan.row_length).to(device)
        loss = _train_step(model, balance, optimizer, ids_BT, rate, plan)
        if step % 50 == 0 or step + 1 == plan.steps:
            seconds = time.monotonic() - started
            print(
                f"target step {step} loss {loss:.3f} {seconds:.0f}s\n{balance.histogram()}",
                file=sys.stderr,
                flush=True,
            )
    balance.remove()
    model.set_attn_implementation("sdpa")
    return round_to_bfloat16(model.eval())


def _optimizer(model: torch.nn.Module, plan: TargetTraining) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_lr, betas=(0.9, 0.95), fused=True)


def _train_step(
    model: Llama4ForCausalLM,
    balance: "RouterBalance",
    optimizer: torch.optim.Optimizer,
    ids_BT: torch.Tensor,
    rate: float,
    plan: TargetTraining,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    (loss + plan.balance * balance.loss()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def place(model: torch.nn.Module, device: str) -> None:
    """Move in place; the wrapper that transformers puts around `to` confuses type checkers."""
    model.to(device)


@torch.no_grad()
def round_to_bfloat16(model: Llama4ForCausalLM) -> Llama4ForCausalLM:
    """Round every weight in place, so that float32 and shipped bfloat16 weights are equal."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    return model
