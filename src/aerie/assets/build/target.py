"""The target's configuration and its files, in transformers' own format."""

from pathlib import Path

from transformers import Llama4ForCausalLM, Llama4TextConfig

from aerie.assets.build.model import Llama4
from aerie.assets.build.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE
from aerie.llama4.config import Llama4Config


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


def new_target(device: str) -> Llama4:
    """An untrained target."""
    return Llama4(Llama4Config.from_hf(target_config().to_dict())).to(device)


def save_target(model: Llama4, folder: Path) -> None:
    """Write the weights, rounded to bfloat16, through transformers."""
    theirs = Llama4ForCausalLM(target_config()).bfloat16()
    theirs.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    theirs.save_pretrained(folder)
