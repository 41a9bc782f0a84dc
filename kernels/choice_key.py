"""A value and the id it belongs to as one int64, whose order is the order of a choice.

The larger value first, then the lower id (`draft_vocab_merge.sort_key`). So the best of several
parts of a row, on several ranks too, is one maximum of integers: no order of reduction changes it.
"""

import torch
from torch import Tensor

NO_KEY = -(2**63)  # below every key: a part with nothing to choose
LOWEST_BITS = 0x7FFFFFFF


def choice_key(values: Tensor, ids: Tensor) -> Tensor:
    """Keys of float32 `values` and int64 `ids` (0 .. 2^31 - 1). NaN goes before everything."""
    values = torch.where(values.isnan(), torch.nan, values)  # which has several bit patterns
    return (ordered_bits(values).long() << 32) | (LOWEST_BITS - ids)


def key_value(keys: Tensor) -> Tensor:
    """The values, float32."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & LOWEST_BITS)).view(torch.float32)


def key_id(keys: Tensor) -> Tensor:
    """The ids, int64; -1 of NO_KEY."""
    return torch.where(keys == NO_KEY, -1, LOWEST_BITS - (keys & LOWEST_BITS))


def ordered_bits(values: Tensor) -> Tensor:
    """The bits of float32 values as int32 that rise with them; -0 ties with 0."""
    bits = (values.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & LOWEST_BITS)
