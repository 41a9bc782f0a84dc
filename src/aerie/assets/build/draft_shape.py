"""Sizes of the draft."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftShape:
    """Sizes of the draft; taps name the residual stream that enters these target layers."""

    vocab_size: int = 1024
    draft_vocab_size: int = 768
    hidden_size: int = 128
    intermediate_size: int = 384
    num_heads: int = 10
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    taps: tuple[int, int, int] = (2, 6, 9)
