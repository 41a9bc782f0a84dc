"""Which part of every matrix a rank of a tensor-parallel group holds. Numbers only, no processes.

    q, k, v            whole heads; a key/value head lies on every rank that has a query of it
    gate, up           the same columns of the feed-forward width, each half cut by itself
    o, down            the inputs that belong to those: partial sums, to be added over the ranks
    experts            by width like any feed-forward, or whole ones (expert parallelism)
    embedding, head    a range of the vocabulary
    norms, router      everything

A width or vocabulary that the size does not divide is cut into parts as equal as whole units make
them, so every divisor of the head count serves (`sizes_for`). No cut is padded.
"""

import math
from dataclasses import dataclass, replace

from aerie.llama4.attention_config import AttentionSpec
from aerie.llama4.config import Llama4Config

UNIT = 128  # a block of FP8 scales, and a tile of the kernels: parts are whole ones where they can


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`; `expert_parallel` deals whole experts out instead of their widths."""

    rank: int = 0
    size: int = 1
    expert_parallel: bool = False

    def part(self, total: int) -> slice:
        """This rank's range of a width or vocabulary of `total`."""
        unit = _unit(total, self.size)
        units = -(-total // unit)
        ends = (units * rank // self.size * unit for rank in (self.rank, self.rank + 1))
        first, last = (min(end, total) for end in ends)
        return slice(first, last)

    def width(self, total: int) -> int:
        """How much of `total` that is."""
        own = self.part(total)
        return own.stop - own.start

    def heads(self, num_heads: int) -> range:
        """This rank's query heads."""
        count = num_heads // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def kv_heads(self, num_heads: int, num_kv_heads: int) -> list[int]:
        """The key/value head that each of this rank's serves as, ascending.

        One appears twice where its queries do not fill the groups that attention wants equal.
        """
        heads, group = self.heads(num_heads), num_heads // num_kv_heads
        own_group = math.gcd(len(heads), group)
        return [head // group for head in heads[::own_group]]

    def experts(self, num_experts: int) -> range:
        """The experts this rank holds (a part of, without expert parallelism)."""
        if not self.expert_parallel:
            return range(num_experts)
        count = num_experts // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def expert_width(self, width: int) -> int:
        """How many of their columns."""
        return width if self.expert_parallel else self.width(width)


WHOLE = Shard()


def sizes_for(num_heads: int, widths: tuple[int, ...], num_experts: int | None = None) -> list[int]:
    """The sizes that cut a model: divisors of its heads (and experts, where those are dealt out)
    that leave no rank without a column."""
    return [
        size
        for size in range(1, num_heads + 1)
        if num_heads % size == 0
        and (num_experts is None or num_experts % size == 0)
        and size <= min(widths)
    ]


def check_shard(config: Llama4Config, shard: Shard) -> None:
    """Raises ValueError, listing the sizes that do, where this target cannot be cut."""
    if shard.size == 1:
        return
    experts = config.num_local_experts if shard.expert_parallel and config.moe_layers else None
    widths = config.intermediate_size, config.intermediate_size_mlp, config.vocab_size
    sizes = sizes_for(config.num_attention_heads, widths, experts)
    if shard.size not in sizes:
        dealt = "" if experts is None else f" and its {experts} experts"
        raise ValueError(
            f"tensor_parallel_size: must divide the target's {config.num_attention_heads} heads"
            f"{dealt}: one of {', '.join(map(str, sizes))}; got {shard.size}"
        )
    if config.attention_bias:
        raise ValueError(
            f"tensor_parallel_size: a target with attention_bias is not cut (no Llama 4 has one), "
            f"got {shard.size}; use 1"
        )


def local_attention(spec: AttentionSpec, shard: Shard) -> AttentionSpec:
    """The attention of this rank's heads."""
    if shard.size == 1:
        return spec
    kv_heads = shard.kv_heads(spec.num_heads, spec.num_kv_heads)
    heads = shard.heads(spec.num_heads)
    return replace(spec, num_heads=len(heads), num_kv_heads=len(kv_heads))


def _unit(total: int, size: int) -> int:
    """The largest unit up to UNIT that gives equal parts, else that leaves no rank without one."""
    units = [unit for unit in (UNIT >> shift for shift in range(8)) if total % unit == 0]
    equal = (unit for unit in units if total // unit % size == 0)
    filling = (unit for unit in units if total // unit >= size)
    return next(equal, next(filling, 1))
