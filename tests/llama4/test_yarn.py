"""YaRN's frequencies and factor against transformers', for every key that files write.

Regimes: the whole ramp inside the head, its ends outside, both on one pair, bounds not rounded, and
DeepSeek's two `mscale` keys.
"""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aerie.llama4.attention_config import read_rope
from aerie.llama4.json_fields import CheckpointError

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 2048}
CASES = {
    "ModelOpt": {},
    "not rounded": {"truncate": False},
    "own bounds": {"beta_fast": 8.0, "beta_slow": 2.0},
    "one pair": {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "short": {"original_max_position_embeddings": 4},
    "own factor": {"attention_factor": 1.25},
    "DeepSeek": {"mscale": 1.0, "mscale_all_dim": 0.5},
    "one mscale": {"mscale": 0.7},
    "no stretch": {"factor": 1.0},
}


@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case, head_dim):
    section = {**YARN, **CASES[case]}
    rope = read_rope({"rope_theta": 10000.0, "rope_scaling": section}, 1.0, may_be_yarn=True)
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=65536,
        rope_parameters={**section, "rope_theta": 10000.0},
    )
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(rope.frequencies(head_dim), expected, rtol=1e-6, atol=0)
    assert rope.score_factor == pytest.approx(factor**2)


def test_a_target_has_none():
    with pytest.raises(CheckpointError, match="supported are 'default', 'llama3'; got 'yarn'"):
        read_rope({"rope_scaling": YARN}, 500000.0)
