"""YaRN (Peng et al. 2023, arXiv 2309.00071, section 3), as transformers computes it.

Of the frequencies f[j] = theta^(-2j / K), those that turn more than `beta_fast` times within the
original context C stay, those below `beta_slow` turns are divided by `factor`, and between them the
pair's number decides:

    pair(b) = K ln(C / (2 pi b)) / (2 ln theta)         the pair that turns b times
    r[j] = (j - pair(beta_fast)) / (pair(beta_slow) - pair(beta_fast)), held to 0..1
    f'[j] = (1 - r[j]) f[j] + r[j] f[j] / factor

Cosines and sines are multiplied by 0.1 ln(factor) + 1, so scores by its square. ModelOpt trains
drafts without it and writes it into every file that it exports (`eagle_export_rope_scaling`).

Letters: K head dimension, J rotary pairs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aerie.kernels.rotation import inverse_frequencies
from aerie.llama4.json_fields import CheckpointError, flag, integer, number

MIN_BAND = 0.001  # pairs, where both bounds fall on one; transformers' own


@dataclass(frozen=True)
class YarnScaling:
    """Fields named as in configs; `attention_factor` multiplies cosines and sines."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    @property
    def score_factor(self) -> float:
        """Of a query's product with a key: both were multiplied."""
        return self.attention_factor**2


def read_yarn(values: Mapping[str, Any]) -> YarnScaling:
    """From a section of `rope_type` "yarn". Raises CheckpointError."""
    factor = number(values, "factor")
    scaling = YarnScaling(
        factor=factor,
        original_max_position_embeddings=integer(values, "original_max_position_embeddings"),
        beta_fast=number(values, "beta_fast", 32.0),
        beta_slow=number(values, "beta_slow", 1.0),
        attention_factor=number(values, "attention_factor", _attention_factor(values, factor)),
        truncate=flag(values, "truncate", True),
    )
    if scaling.beta_slow > scaling.beta_fast:
        raise CheckpointError(
            f"config key 'beta_slow': {scaling.beta_slow:g} must not exceed beta_fast "
            f"{scaling.beta_fast:g}"
        )
    return scaling


def yarn_frequencies(head_dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """The [J] frequencies f'."""
    frequency_J = inverse_frequencies(head_dim, theta, None)
    context = scaling.original_max_position_embeddings
    first, last = (
        head_dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pair_J = torch.arange(len(frequency_J), dtype=torch.float32)
    width = last - first if last != first else MIN_BAND
    share_J = ((pair_J - first) / width).clamp(0, 1)
    return frequency_J * (1 - share_J) + frequency_J / scaling.factor * share_J


def _attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """DeepSeek's `mscale` keys, where both are there, weigh the logarithm."""
    if not (values.get("mscale") and values.get("mscale_all_dim")):
        return _gain(factor, 1.0)
    whole, every = number(values, "mscale"), number(values, "mscale_all_dim")
    return _gain(factor, whole) / _gain(factor, every)


def _gain(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
