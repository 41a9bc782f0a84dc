"""Logits processors of transformers, called with whole prefixes at every verified position.

They are Python: calling them reads the device, and no captured round can.
"""

from torch import Tensor

from aerie.eagle3.prefixes import Prefixes
from aerie.eagle3.sampling import LogitsProcessor


def processed(processor: LogitsProcessor, logits_NV: Tensor, prefixes: Prefixes) -> Tensor:
    """Rows of one sequence; those of one depth have prefixes of one length and are one call."""
    result_NV = logits_NV.clone()
    depths = prefixes.depths_BN[0].tolist()
    for depth in sorted(set(depths)):
        rows = [row for row, other in enumerate(depths) if other == depth]
        result_NV[rows] = _checked(processor, prefixes.whole(depth), logits_NV[rows])
    return result_NV


def _checked(processor: LogitsProcessor, ids: Tensor, scores_TV: Tensor) -> Tensor:
    result = processor(ids, scores_TV)
    if not isinstance(result, Tensor) or result.shape != scores_TV.shape:
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"logits_processors: {processor!r} must return scores {tuple(scores_TV.shape)}, "
            f"got {shape}"
        )
    return result
