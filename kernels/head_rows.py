"""A draft head cut out of a target head: the rows of the kept target ids, and their offsets.

    head[u] = target_head[ids[u]]                    d2t[u] = ids[u] - u

For a draft checkpoint that has no head of its own, or one that is pruned again to fewer ids. The
rows are copied by `embedding`, so they keep their bits. This runs when a draft is loaded or built:
the checks read the ids and wait for the device.

Letters: V target vocabulary, D hidden, U draft vocabulary.
"""

import torch
from torch import Tensor

from aerie.kernels.backend import ResolvedBackend, pick
from aerie.kernels.embedding import embedding, embedding_ref


def head_rows(head_VD: Tensor, ids_U: Tensor, backend: ResolvedBackend) -> Tensor:
    """Rows `ids_U` of `head_VD`, [U, D]. The ids must be as `offsets_from_ids` wants them."""
    _check_ids(ids_U, head_VD.shape[0])
    return pick(backend, embedding, embedding_ref)(ids_U, head_VD)


def offsets_from_ids(ids_U: Tensor, vocabulary: int) -> Tensor:
    """`d2t_U` of kept target ids: int64, strictly rising, within [0, vocabulary).

    Raises ValueError naming the first id that breaks the rule.
    """
    _check_ids(ids_U, vocabulary)
    return ids_U - torch.arange(len(ids_U), device=ids_U.device)


def ids_from_offsets(d2t_U: Tensor) -> Tensor:
    """Target ids of all draft ids; to prune a draft again, keep some of these."""
    return torch.arange(len(d2t_U), device=d2t_U.device) + d2t_U


def _check_ids(ids_U: Tensor, vocabulary: int) -> None:
    if ids_U.ndim != 1 or ids_U.dtype != torch.int64 or len(ids_U) == 0:
        raise ValueError(f"ids_U: must be int64 [U], got {ids_U.dtype} {tuple(ids_U.shape)}")
    ids = ids_U.tolist()
    for u, id in enumerate(ids):
        if not 0 <= id < vocabulary or (u > 0 and id <= ids[u - 1]):
            before = f" after {ids[u - 1]}" if u > 0 else ""
            raise ValueError(
                f"ids_U: must rise strictly within 0..{vocabulary - 1}, "
                f"got {id} at index {u}{before}"
            )
