"""Speculative greedy ids equal plain greedy ids, exactly, in float32.

Regimes: hundreds of random (model, draft, prompt, k); drafts that are always right (acceptance
length exactly k + 1), always wrong (exactly 1) and right now and then (partial acceptance, which
leaves rejected rows behind in the cache); ends inside an accepted run; prompts around chunk edges;
texts far longer than what a chunked layer keeps; FP8 linears, which long prompts meet as codes.
"""

import random
from dataclasses import dataclass, field

import pytest
import torch

from aerie.eagle3.batch import Committed
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.decoding import Decoding
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.generate import generate
from aerie.eagle3.policies import Chain
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.streams import Generation
from aerie.eagle3.tree import DraftTree, chain
from aerie.kernels.linear import Linear
from aerie.kernels.scaled_linear import STREAMED_ROWS
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.config import Llama4Config
from aerie.llama4.fp8_layout import hold_fp8
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.quantization import Group, Quantization
from aerie.llama4.weight_quantization import quantize_weight

VOCAB, CHUNK, CONTEXT = 32, 16, 160


def randomise(model: torch.nn.Module) -> None:
    """Alike however a backend lays its weights out."""
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, device=parameter.device)
        values.normal_(1.0 if "norm" in name else 0.0, 0.3 if parameter.ndim > 1 else 0.5)
        parameter.data.copy_(values)


def random_target(
    seed: int, backend="eager", context=CONTEXT, num_hidden_layers: int | None = None
) -> Llama4ForCausalLM:
    choose = random.Random(seed)
    torch.manual_seed(seed)
    config = {
        "model_type": "llama4_text",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "intermediate_size_mlp": 40,
        "num_hidden_layers": choose.choice([4, 5, 8]),
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": choose.choice([2, 4]),
        "num_experts_per_tok": choose.choice([1, 1, 2]),
        "interleave_moe_layer_step": choose.choice([1, 2]),
        "attention_chunk_size": CHUNK,
        "use_qk_norm": choose.choice([True, False]),
        "floor_scale": choose.choice([8, 8192]),
        "no_rope_layer_interval": choose.choice([2, 4]),
        "max_position_embeddings": context,
    }
    if num_hidden_layers is not None:
        config["num_hidden_layers"] = num_hidden_layers
    model = Llama4ForCausalLM(Llama4Config.from_hf(config), backend)
    randomise(model)
    return model


def random_draft(seed: int, target: Llama4ForCausalLM) -> Eagle3Llama4ForCausalLM:
    choose = random.Random(seed)
    config = {
        "architectures": [choose.choice(["LlamaForCausalLMEagle3", "Eagle3Llama4ForCausalLM"])],
        "vocab_size": VOCAB,
        "draft_vocab_size": choose.choice([20, VOCAB]),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]},
    }
    draft_config = Eagle3Config.from_hf(config, target.config.num_hidden_layers)
    draft = Eagle3Llama4ForCausalLM(draft_config, target.backend)
    randomise(draft)
    kept = torch.randperm(VOCAB)[: draft_config.draft_vocab_size].sort().values
    draft.d2t = kept - torch.arange(len(kept))
    draft.bind(target)
    return draft


@dataclass
class ScriptedDrafter:
    """Proposes `num_tokens` of the known continuation, each right with probability `right`."""

    plain: list[int]
    right: float
    num_tokens: int
    choose: random.Random = field(default_factory=lambda: random.Random(0))
    known: int = 0
    tap_layers: tuple[int, ...] = ()
    cache: PagedKVCache | None = None

    def prefill(self, prompt, taps_TD) -> None:
        """A script needs no prompt."""

    def propose(self, committed: Committed) -> DraftTree:
        self.known += int(committed.counts_B[0])  # the prompt's last row first
        return self.continued()

    def continued(self) -> DraftTree:
        truth = self.plain[self.known : self.known + self.num_tokens]
        truth += [0] * (self.num_tokens - len(truth))
        shifts = [0 if self.choose.random() < self.right else 1 for _ in truth]
        wrong = [(token + shift) % VOCAB for token, shift in zip(truth, shifts, strict=True)]
        return chain(torch.tensor([wrong]))


def scripted(target, prompt, plain: list[int], right: float, k: int, **options) -> Generation:
    drafter = ScriptedDrafter(plain, right, k)
    decoding = Decoding(
        target, prompt, num_speculative_tokens=k, drafter=drafter, **{"eos_token_ids": ()} | options
    )
    tokens = [token for burst in decoding for token in burst]
    assert decoding.finish_reason is not None
    return Generation(tokens, decoding.finish_reason, decoding.stats)


def random_prompt(seed: int) -> list[int]:
    choose = random.Random(seed)
    length = choose.choice([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, choose.randint(3, 40)])
    return [choose.randrange(VOCAB) for _ in range(length)]


@pytest.mark.parametrize("block", range(20))
def test_random_drafts(block):
    """20 x 10 random models, drafts, prompts and k; a random draft is accepted now and then."""
    for seed in range(10 * block, 10 * block + 10):
        target, prompt = random_target(seed), random_prompt(seed)
        draft, k = random_draft(seed, target), 1 + seed % 7
        plain = generate(target, prompt, 16, eos_token_ids=())
        speculative = generate(target, prompt, 16, draft, k, eos_token_ids=())
        assert speculative.tokens == plain.tokens, f"seed {seed}, k {k}, prompt {prompt}"


@pytest.mark.parametrize("block", range(10))
def test_partial_acceptance(block):
    """20 rounds each of drafts that are right with probability 0.7: all run lengths occur."""
    accepted_lengths = set()
    for seed in range(10 * block, 10 * block + 10):
        target, prompt, k = random_target(seed), random_prompt(seed), 1 + seed % 6
        plain = generate(target, prompt, 40, eos_token_ids=())
        result = scripted(target, prompt, plain.tokens, 0.7, k, max_new_tokens=40)
        assert result.tokens == plain.tokens, f"seed {seed}, k {k}, prompt {prompt}"
        accepted_lengths |= {0 < n < result.stats.num_drafts for n in result.stats.accepted_at}
    assert True in accepted_lengths


@pytest.mark.parametrize("k", [1, 3, 4, 7])
def test_oracle_draft_accepts_everything(k):
    target, prompt = random_target(k), random_prompt(k)
    count = 1 + 4 * (k + 1)  # the prompt's token, then whole runs
    plain = generate(target, prompt, count + k, eos_token_ids=())
    result = scripted(target, prompt, plain.tokens, 1.0, k, max_new_tokens=count)
    assert result.tokens == plain.tokens[:count]
    assert result.stats.acceptance_length == k + 1
    assert result.stats.num_target_passes == 1 + 4
    assert result.stats.conditional_acceptance_per_position == [1.0] * k


@pytest.mark.parametrize("k", [1, 4])
def test_wrong_draft_accepts_nothing(k):
    target, prompt = random_target(k), random_prompt(k)
    plain = generate(target, prompt, 20, eos_token_ids=())
    result = scripted(target, prompt, plain.tokens, 0.0, k, max_new_tokens=20)
    assert result.tokens == plain.tokens
    assert result.stats.acceptance_length == 1
    assert result.stats.num_target_passes == plain.stats.num_target_passes == 20


@dataclass
class RightDownTo(ScriptedDrafter):
    """The truth down to level `depth` of every chain, wrong tokens below."""

    depth: int = 0

    def continued(self) -> DraftTree:
        tokens_BN = super().continued().tokens_BN
        tokens_BN[:, self.depth :] = (tokens_BN[:, self.depth :] + 1) % VOCAB
        return chain(tokens_BN)


@pytest.mark.parametrize("depth", range(6))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_draft_that_is_right_down_to_a_depth(depth, temperature):
    target, prompt = random_target(depth), random_prompt(depth)
    params, count = SamplingParams(temperature, seed=1), 1 + 4 * (depth + 1)
    plain = generate(target, prompt, count + 5, eos_token_ids=(), sampling=params)
    drafter = RightDownTo(plain.tokens, 1.0, 5, depth=depth)
    decoding = Decoding(target, prompt, count, None, 5, (), drafter, sampling=params)
    list(decoding)
    assert decoding.tokens == plain.tokens[:count]
    assert decoding.stats.acceptance_histogram == [4 * (n == depth) for n in range(6)]
    assert decoding.stats.acceptance_length == depth + 1


@pytest.mark.parametrize("where", range(1, 12))
def test_end_token_inside_an_accepted_run(where):
    target, prompt = random_target(3), random_prompt(3)
    plain = generate(target, prompt, 30, eos_token_ids=())
    end = plain.tokens[where]
    first = plain.tokens.index(end)
    result = scripted(
        target, prompt, plain.tokens, 1.0, 5, max_new_tokens=30, eos_token_ids=(end, VOCAB - 1)
    )
    expected = generate(target, prompt, 30, eos_token_ids=(end, VOCAB - 1))
    assert result.tokens == expected.tokens
    assert len(result.tokens) <= first + 1
    assert result.finish_reason == "eos"


@pytest.mark.parametrize("count", range(1, 14))
def test_token_limit_inside_an_accepted_run(count):
    target, prompt = random_target(4), random_prompt(4)
    plain = generate(target, prompt, 30, eos_token_ids=())
    result = scripted(target, prompt, plain.tokens, 1.0, 5, max_new_tokens=count)
    assert result.tokens == plain.tokens[:count]
    assert result.finish_reason == "length"
    assert result.stats.num_tokens == count


@pytest.mark.parametrize("left", range(1, 9))
def test_runs_up_to_the_last_position_of_the_context(left):
    """Drafts reach beyond the last position, and the text fills the context exactly."""
    target = random_target(5)
    prompt = [7] * (CONTEXT - left)
    plain = generate(target, prompt, 100, eos_token_ids=())
    draft = generate(target, prompt, 100, random_draft(5, target), 4, eos_token_ids=())
    oracle = scripted(target, prompt, plain.tokens, 1.0, 4, max_new_tokens=100)
    assert len(plain.tokens) == left
    assert plain.tokens == draft.tokens == oracle.tokens
    assert plain.finish_reason == draft.finish_reason == oracle.finish_reason == "context"


def test_bursts_are_the_accepted_runs():
    target, prompt = random_target(6), random_prompt(6)
    plain = generate(target, prompt, 13, eos_token_ids=())
    drafter = ScriptedDrafter(plain.tokens, 1.0, 3)
    decoding = Decoding(target, prompt, 13, None, 3, (), drafter)
    assert [len(burst) for burst in decoding] == [1, 4, 4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_recycled_pages_of_chunked_layers(seed, monkeypatch):
    """128 slots for 16 chunks: plain and drafted ids are those of one pass that keeps all rows."""
    for module in ("engine", "rows"):
        monkeypatch.setattr(f"aerie.eagle3.{module}.PREFILL_ROWS", 8)
    target, prompt = random_target(seed, context=300), random_prompt(seed)
    prompt = [7 * i % VOCAB for i in range(150)] + prompt
    plain = generate(target, prompt, 80, eos_token_ids=())
    drafter = ScriptedDrafter(plain.tokens, 0.7, 5)
    decoding = Decoding(target, prompt, 80, None, 5, (), drafter)
    full, ring = decoding.decodings.rows.cache.pools
    assert ring.plan.num_pages == 2 < full.plan.num_pages
    assert [token for burst in decoding for token in burst] == plain.tokens
    speculative = generate(target, prompt, 80, random_draft(seed, target), 3, eos_token_ids=())
    assert speculative.tokens == plain.tokens
    ids = torch.tensor(prompt + plain.tokens[:-1])
    whole = target.allocate_cache(len(ids), max_step_rows=len(ids))
    logits = target(ids, whole.causal_step(len(ids))).logits_TV
    assert logits[len(prompt) - 1 :].argmax(-1).tolist() == plain.tokens


@pytest.mark.parametrize("block", range(4))
def test_fp8_cache(block):
    """Equal codes for equal rows. Sums differ in their last bit between passes of one row and of
    several, which can change a code: so this is tested on fixed seeds, and not promised."""
    for seed in range(5 * block, 5 * block + 5):
        target, prompt, k = random_target(seed), random_prompt(seed), 1 + seed % 6
        plain = generate(target, prompt, 30, eos_token_ids=(), kv_cache_dtype="fp8").tokens
        result = scripted(target, prompt, plain, 0.7, k, max_new_tokens=30, kv_cache_dtype="fp8")
        assert result.tokens == plain, f"seed {seed}, k {k}, prompt {prompt}"
        draft = random_draft(seed, target)
        drafted = generate(target, prompt, 30, draft, k, eos_token_ids=(), kv_cache_dtype="fp8")
        assert drafted.tokens == plain, f"seed {seed}, k {k}, prompt {prompt}"


DENSE = tuple(f"feed_forward.{name}_proj" for name in ("gate", "up", "down"))
FP8_LINEARS = ("self_attn", "shared_expert", *DENSE)


def linears_of(target: Llama4ForCausalLM) -> list[Linear]:
    return [module for module in target.modules() if isinstance(module, Linear)]


def with_fp8_linears(target: Llama4ForCausalLM) -> Llama4ForCausalLM:
    """Its experts stay as they are: FP8 ones meet codes in rounds too."""
    linears = linears_of(target)
    wide = [linear.weight.data for linear in linears]
    hold_fp8(target, Quantization("test", (Group(FP8_LINEARS, "channel", False),), ()))
    for linear, weight in zip(linears, wide, strict=True):
        if linear.weight_scale is not None:
            quantize_weight(weight, linear.weight.data, linear.weight_scale.data)
    return target


@pytest.mark.parametrize("seed", range(3))
def test_prompts_that_meet_fp8_linears_as_codes(seed):
    """Rounds never do: alone, among others, with many rows together and with a draft."""
    target = with_fp8_linears(random_target(seed, context=300))
    assert sum(linear.row_codes == "row" for linear in linears_of(target)) >= 12
    counts = (3, STREAMED_ROWS - 1, STREAMED_ROWS, STREAMED_ROWS + 1, 200)
    prompts = [[(7 * i + seed) % VOCAB for i in range(count)] for count in counts]
    plain = [generate(target, prompt, 20, eos_token_ids=()).tokens for prompt in prompts]
    for prompt, expected in zip(prompts, plain, strict=True):
        assert scripted(target, prompt, expected, 0.7, 5, max_new_tokens=20).tokens == expected
    wide = Chain(40)  # 205 rows of five sequences
    draft = random_draft(seed, target)
    together = generate(target, prompts, 20, draft, eos_token_ids=(), policy=wide)
    assert [result.tokens for result in together] == plain


def test_triton_backend():
    """The same loop with every op interpreted: ids as the eager backend's."""
    eager, triton = random_target(9), random_target(9, "triton")
    prompt = random_prompt(2)
    expected = generate(eager, prompt, 8, eos_token_ids=()).tokens
    draft = random_draft(9, triton)
    assert generate(triton, prompt, 8, eos_token_ids=()).tokens == expected
    assert generate(triton, prompt, 8, draft, 3, eos_token_ids=()).tokens == expected


def test_nan_logits_raise():
    target = random_target(1)
    target.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="contain NaN or"):
        generate(target, [1, 2], 4)


def test_rejects_bad_requests():
    target = random_target(1)
    for prompt in ([], [1] * CONTEXT):
        with pytest.raises(ValueError, match=r"prompt_ids: must hold 1\.\.159 tokens"):
            generate(target, prompt, 4)
    for token in (-1, VOCAB):
        with pytest.raises(ValueError, match=r"prompt_ids: must lie in 0\.\.31"):
            generate(target, [1, token], 4)
    with pytest.raises(ValueError, match="max_new_tokens: must be at least 1, got 0"):
        generate(target, [1], 0)
    for k in (0, -1, 64):
        with pytest.raises(ValueError, match="num_speculative_tokens"):
            generate(target, [1], 4, None, k)
