"""The draft's files, in the raw (EAGLE / SpecForge) layout.

No tap ids are written: readers disagree on their meaning, and all agree on the default
(2, N // 2, N - 3), the residual stream that enters those layers, which is what is used here.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from aerie.assets.build.draft import Draft
from aerie.assets.build.draft_shape import DraftShape
from aerie.assets.build.tokenizer import BOS_ID, EOS_ID, PAD_ID


def save_draft(draft: Draft, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, the weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = draft.shape
    tensors = {
        name: tensor.to("cpu", torch.bfloat16).contiguous()
        for name, tensor in draft.state_dict().items()
    }
    del tensors["kept_U"]
    kept_U = draft.kept_U.cpu()
    # d2t holds offsets: target id = draft id + d2t[draft id].
    tensors["d2t"] = kept_U - torch.arange(len(kept_U))
    tensors["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool)
    tensors["t2d"][kept_U] = True
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(draft_config(shape), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def draft_config(shape: DraftShape) -> dict[str, object]:
    """The flat LLaMA-like keys of the raw layout."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": 1024,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
    }
