"""Learning rates by step."""

import math


def cosine(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up, then half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def line(step: int, length: int, start: float, end: float) -> float:
    """From `start` to `end` in `length` equal steps."""
    return start + (end - start) * step / length
