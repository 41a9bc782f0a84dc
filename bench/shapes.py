"""Sizes of Llama 4 Scout, by the letters of CONTRIBUTING.md, and smaller ones for a CPU.

A CPU run exercises the benches and watches the references; it is reduced where the real size would
take gigabytes or seconds. Every row carries the shapes it was measured with.
"""

import torch

ON_GPU = torch.cuda.is_available()

D, H, G, K = 5120, 40, 8, 128
L, V, CHUNK = 48, 202048, 8192
E, F = (16, 8192) if ON_GPU else (4, 512)

ROWS = (1, 4, 8, 16, 32, 64) if ON_GPU else (1, 8)  # of one step; what the goals are stated for
FEW_ROWS = (1, 8, 64) if ON_GPU else (1, 8)  # for ops that are all latency


def features_of(features: int, weight_dtype: str) -> int:
    """Rows of a weight. A reference in FP8 widens it at every call: a CPU gets a sixteenth."""
    return features // 16 if weight_dtype == "fp8" and not ON_GPU else features
