"""What the ranks of a cut target tell each other in one round, counted before anything runs.

Bytes are the payload of a rank; a ring moves 2 (N - 1) / N of a sum's over each link.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from aerie.eagle3.config import Eagle3Config
from aerie.llama4.config import Llama4Config


@dataclass(frozen=True)
class Traffic:
    """Calls of one kind in a round, and the bytes of all of them."""

    calls: int
    nbytes: int


def round_traffic(
    target: Llama4Config,
    draft: Eagle3Config | None,
    *,
    itemsize: int,
    batch: int,
    num_drafted: int,
    depth: int,
    draft_size: int,
) -> Mapping[str, Traffic]:
    """Of a greedy round that verifies `num_drafted` nodes behind each of `batch` roots.

    `draft_size` 1 is a chain that rank 0 drafts; otherwise each of `depth` levels is drafted by all
    ranks, one row a sequence (the first over all committed rows, at most `depth` + 1 of each).
    """
    rows, layers = batch * (1 + num_drafted), target.num_hidden_layers
    hidden = rows * target.hidden_size * itemsize
    traffic = {
        "embedding": Traffic(1, hidden),
        "attention": Traffic(layers, layers * hidden),
        "feed-forward": Traffic(layers, layers * hidden),
        "choice": Traffic(1, rows * 8),
    }
    if draft is None:
        return traffic
    if draft_size == 1:
        return traffic | {"drafted ids": Traffic(1, batch * num_drafted * 8)}
    drafting = batch * (depth + 1) + batch * (depth - 1)
    sums = 3 * drafting * draft.hidden_size * itemsize  # embedding, attention, feed-forward
    return traffic | {
        "draft": Traffic(3 * depth, sums),
        "draft's choice": Traffic(depth, depth * batch * 2 * 8),
    }
