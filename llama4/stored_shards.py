"""What one rank reads of a checkpoint: of every stored tensor its slices, and no byte more.

A rule per projection says which dimension is cut and where (`sharding`); FP8 scales follow the rows
and columns of their codes. The rest of the loader sees the slices as tensors of their own.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from aerie.llama4.config import Llama4Config
from aerie.llama4.json_fields import CheckpointError
from aerie.llama4.packing import SCALES
from aerie.llama4.safetensors_header import StoredTensor
from aerie.llama4.sharding import Shard
from aerie.llama4.stored_tensors import MAX_LISTED
from aerie.llama4.weight_quantization import BLOCK

EXPERT = re.compile(r"\bexperts\.(\d+)\.")
FUSED = re.compile(r"\bexperts\.(gate_up|down)_proj(_\w+)?$")
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
COLUMNS = ("o_proj", "down_proj")  # the inputs of these are cut
FOLLOW_ROWS = ("bias", *SCALES)


@dataclass(frozen=True)
class Cut:
    """Of dimension `dim` the ranges `slices`, one behind the other."""

    dim: int
    slices: tuple[slice, ...]

    @property
    def size(self) -> int:
        return sum(part.stop - part.start for part in self.slices)


@dataclass(frozen=True)
class TensorSlices(StoredTensor):
    """A cut of a stored tensor of the shape `whole`; shape and bytes are those of the cut."""

    whole: tuple[int, ...]
    cut: Cut

    @classmethod
    def of(cls, tensor: StoredTensor, cut: Cut) -> "TensorSlices":
        shape = (*tensor.shape[: cut.dim], cut.size, *tensor.shape[cut.dim + 1 :])
        nbytes = tensor.nbytes // math.prod(tensor.shape) * math.prod(shape)
        return cls(
            tensor.name, tensor.file, tensor.kind, shape, tensor.offset, nbytes, tensor.shape, cut
        )

    def extents(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Several where the cut is not of rows, or takes rows from several places."""
        dim, itemsize = self.cut.dim, self.nbytes // max(1, math.prod(self.shape))
        unit = itemsize * math.prod(self.whole[dim + 1 :])
        if dim == 0:
            for part in self.cut.slices:
                count = part.stop - part.start
                begin, end = max(0, first), min(count, last)
                if begin < end:
                    yield self.offset + (part.start + begin) * unit, (end - begin) * unit
                first, last = first - count, last - count
            return
        above = math.prod(self.whole[1:dim])
        for outer in range(first * above, last * above):
            for part in self.cut.slices:
                at = outer * self.whole[dim] + part.start
                yield self.offset + at * unit, (part.stop - part.start) * unit


@dataclass(frozen=True)
class RankReader:
    """The rules for a model of these head and expert counts."""

    shard: Shard
    num_heads: int
    num_kv_heads: int
    num_experts: int

    def __call__(self, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """What this rank reads of the tensors `found`, under their parameter names.

        The experts of other ranks are left out. Raises CheckpointError listing where a rank would
        need a part of an FP8 block.
        """
        own: dict[str, StoredTensor] = {}
        problems: list[str] = []
        for name, tensor in found.items():
            if self._is_elsewhere(name):
                continue
            try:
                cut = self.cut(name, found)
                own[name] = tensor if cut is None else TensorSlices.of(tensor, cut)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError("\n  ".join(problems[:MAX_LISTED]))
        return own

    def cut(self, name: str, found: Mapping[str, StoredTensor]) -> Cut | None:
        """The rule for one tensor; None: it is read as a whole, or is none that belongs here."""
        if FUSED.search(name):
            return self._fused_cut(name, found)
        owner, _, leaf = name.rpartition(".")
        module, weight = owner.rpartition(".")[2], found.get(f"{owner}.weight")
        is_whole_expert = self.shard.expert_parallel and EXPERT.search(name)
        dim = 0 if module in ROWS else 1
        if module not in ROWS + COLUMNS or is_whole_expert or weight is None:
            return None
        shape, total = found[name].shape, (*weight.shape, 0, 0)[dim]
        if leaf == "weight" or (leaf in FOLLOW_ROWS and dim == 0 and shape[:1] == (total,)):
            slices = self._slices(module, total)
            return Cut(dim, slices) if slices and len(shape) > dim else None
        if leaf in SCALES and len(shape) == 2 and shape[dim] == -(-total // BLOCK) > 1:
            return Cut(dim, _blocks(name, self._slices(module, total), total))
        return None

    def _fused_cut(self, name: str, found: Mapping[str, StoredTensor]) -> Cut | None:
        """All experts in one tensor: [E, D, 2F] or [E, F, D], and their scales."""
        shape = found[name].shape
        if self.shard.expert_parallel:
            own = self.shard.experts(self.num_experts)
            is_per_expert = shape[:1] == (self.num_experts,)
            return Cut(0, (slice(own.start, own.stop),)) if is_per_expert else None
        if "gate_up_proj" not in name:
            is_weight = name.endswith("down_proj") and len(shape) == 3
            return Cut(1, (self.shard.part(shape[1]),)) if is_weight else None
        weight = found.get(name[: name.index("gate_up_proj")] + "gate_up_proj")
        both = 0 if weight is None or len(weight.shape) != 3 else weight.shape[2]
        if len(shape) != 3 or both not in shape[1:] or both == 0:
            return None
        own = self.shard.part(both // 2)
        halves = own, slice(both // 2 + own.start, both // 2 + own.stop)
        return Cut(2 if shape[2] == both else 1, halves)

    def _slices(self, module: str, total: int) -> tuple[slice, ...]:
        """Where a projection's dimension of `total` is cut; nothing where no heads make it up."""
        if module in ("q_proj", "o_proj"):
            size, heads = total // self.num_heads, self.shard.heads(self.num_heads)
            return (slice(heads.start * size, heads.stop * size),)
        if module in ("k_proj", "v_proj"):
            size = total // self.num_kv_heads
            heads = self.shard.kv_heads(self.num_heads, self.num_kv_heads)
            return _joined(slice(head * size, (head + 1) * size) for head in heads)
        return (self.shard.part(total),)

    def _is_elsewhere(self, name: str) -> bool:
        number = EXPERT.search(name)
        if number is None or not int(number[1]) < self.num_experts:
            return False
        return int(number[1]) not in self.shard.experts(self.num_experts)


def _joined(slices: Iterable[slice]) -> tuple[slice, ...]:
    """The same with neighbours as one range, which may hold FP8 blocks that heads share."""
    joined: list[slice] = []
    for part in slices:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return tuple(joined)


def _blocks(name: str, slices: tuple[slice, ...], total: int) -> tuple[slice, ...]:
    """Ranges of elements as ranges of their blocks."""
    edges = {edge for part in slices for edge in (part.start, part.stop)} - {total}
    inside = sorted(edge for edge in edges if edge % BLOCK)
    if inside:
        raise CheckpointError(
            f"{name}: tensor parallelism would cut its {BLOCK} x {BLOCK} blocks at {inside} of "
            f"{total}; use a size that leaves whole blocks, or scales per channel"
        )
    return tuple(slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in slices)


def rank_reader(config: Llama4Config, shard: Shard) -> RankReader:
    """For a target."""
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_local_experts
    return RankReader(shard, *counts)
