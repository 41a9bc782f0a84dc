# pyright: reportMissingImports=false
"""A tiny Eagle3 draft made, saved and run by the speculators library itself: an outside oracle.

`python tests/eagle3/speculators_model.py FOLDER`, where the library is installed (0.9.0 was used),
writes the sample that `test_speculators.py` reads where it is not: config and weights as the
library saves them (without the `config.py` it adds), and `expected.safetensors` with the inputs,
the logits of three steps and the chain of first choices that its own forward pass gives.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, DRAFT_VOCAB, WIDTH, ROWS, STEPS = 96, 32, 40, 9, 3
FLAGS = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}


def make_model(draft_vocab: int = DRAFT_VOCAB, **flags: bool) -> Any:
    """A random draft for a target of 8 layers, 40 wide, with 96 tokens."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    layer = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=10,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    proposal = GreedyTokenProposalConfig(speculative_tokens=STEPS)
    verifier = VerifierConfig(name_or_path="none", architectures=["Llama4ForCausalLM"])
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=draft_vocab,
        eagle_aux_hidden_state_layer_ids=[2, 4, 5],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=verifier,
        ),
        **flags,
    )
    model = Eagle3DraftModel(config).eval()
    for name, parameter in model.named_parameters():
        scale, centre = (0.3, 1.0) if parameter.ndim == 1 else (0.2, 0.0)
        torch.nn.init.normal_(parameter, centre if "norm" in name else 0.0, scale)
    if draft_vocab < VOCAB:
        kept = torch.randperm(VOCAB)[:draft_vocab].sort().values
        marks = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, kept, True)
        model.load_vocab_mappings(marks, kept - torch.arange(draft_vocab))
    return model


@torch.no_grad()
def run_model(model: Any) -> dict[str, Tensor]:
    """Random taps and tokens, and what the library's forward pass says of them.

    Row i of step d stands `d` tokens behind token i + 1 and is fed the true tokens on its way.
    """
    taps = torch.randn(ROWS, 3 * WIDTH)
    ids = torch.randint(0, VOCAB, (ROWS,))  # the tokens after each row's own
    logits: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda *call: logits.append(call[2][0].clone()))
    chosen = model(taps[None], ids[None], torch.zeros(1, ROWS, dtype=torch.long), ttt_steps=STEPS)
    hook.remove()
    return {
        "taps": taps,
        "ids": ids,
        "logits": torch.stack(logits),
        "chosen": torch.stack([step[0] for step in chosen]),
    }


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = make_model(**FLAGS)
    model.save_pretrained(folder)
    (folder / "config.py").unlink(missing_ok=True)
    save_file(run_model(model), folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
