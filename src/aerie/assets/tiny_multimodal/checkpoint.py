"""A multimodal Llama 4 of some 100 kB, built by transformers and written as Hugging Face does.

Every character is a token, so that any prompt works. Weights are random here: `training.py` makes
them mean something.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.models.llama4.configuration_llama4 import (
    Llama4Config,
    Llama4TextConfig,
    Llama4VisionConfig,
)
from transformers.models.llama4.modeling_llama4 import Llama4ForConditionalGeneration

from aerie.assets.build.tokenizer import BOS, BOS_ID, EOS_ID, PAD, PAD_ID

EOS = "<|eot|>"  # as Llama 4's chat template ends a message
IMAGE_TOKENS = (
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)
CHAT_TOKENS = ("<|header_start|>", "<|header_end|>")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [BOS, EOS, PAD, *ALPHABET, *IMAGE_TOKENS, *CHAT_TOKENS]
TEXT: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 2,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 128,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 128,  # hidden_size / pixel_shuffle_ratio^2
    "image_size": 16,
    "patch_size": 4,  # 16 patches, so 4 tokens a tile
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
    "vision_output_dim": 48,
}
MAX_TILES = 4


def new_model(**text_changes: Any) -> Llama4ForConditionalGeneration:
    """transformers' own, with random weights; `text_changes` are keys of its text config."""
    config = Llama4Config(
        text_config=Llama4TextConfig(**{**TEXT, **text_changes}),
        vision_config=Llama4VisionConfig(**VISION),
        boi_token_index=TOKENS.index("<|image_start|>"),
        eoi_token_index=TOKENS.index("<|image_end|>"),
        image_token_index=TOKENS.index("<|patch|>"),
    )
    config._attn_implementation = "eager"
    return Llama4ForConditionalGeneration(config)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Well away from initialisation's 0.02, so that every term moves the logits."""
    for name, parameter in model.named_parameters():
        spread = 0.2 if parameter.ndim > 1 else 0.5
        parameter.normal_(1.0 if "norm" in name else 0.0, spread)


def save(model: Llama4ForConditionalGeneration, folder: Path) -> Path:
    """Weights, configs and tokenizer, under the names that published checkpoints use."""
    model.save_pretrained(folder)
    new_tokenizer().save(str(folder / "tokenizer.json"))
    side = VISION["image_size"]
    processor = {
        "image_processor_type": "Llama4ImageProcessorFast",
        "processor_class": "Llama4Processor",
        "size": {"height": side, "width": side},
        "max_patches": MAX_TILES,
        "resize_to_max_canvas": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return folder


def new_tokenizer() -> Tokenizer:
    """Bytes and special tokens; encoding puts BOS in front."""
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in TOKENS if token not in ALPHABET])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer
