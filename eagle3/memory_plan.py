"""What a target and its draft take in memory together, and the largest run that still fits.

A plan is arithmetic over configs: nothing is read or allocated. `llama4/memory_plan.py` says what
is exact. The allocator's own rounding and the CUDA context are not in it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from aerie.eagle3.batch import Batch
from aerie.eagle3.binding import check_fits, tap_layers
from aerie.eagle3.engine import PREFILL_ROWS
from aerie.eagle3.logits_rules import RuleColumns
from aerie.eagle3.planned_pair import DraftPlan, Run, empty_draft, empty_pair, empty_target
from aerie.eagle3.round_memory import graph_bytes, round_bytes
from aerie.eagle3.rows import slack
from aerie.eagle3.sharded_draft import check_draft_shard
from aerie.llama4.communicator import shard_of
from aerie.llama4.config import Llama4Config
from aerie.llama4.memory_plan import KVBytes, activation_bytes, kv_bytes, weight_bytes
from aerie.llama4.sharding import local_attention

GIB = 2**30
CONTEXT = 8192


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one run: `context` tokens, prompt included, of each of `batch` sequences.

    `columns` are what the loop knows of every sequence, its rules included. `activations` are the
    most that one pass of the target keeps between its operations, on Triton's backend (0 on the
    eager one: not planned), and `cuda_graphs` what captured rounds may take (0: none are captured).
    """

    context: int
    batch: int
    target_weights: Mapping[str, int]
    draft_weights: Mapping[str, int]
    kv: KVBytes
    draft_kv: KVBytes
    columns: int
    activations: int
    cuda_graphs: int

    @property
    def keys_and_values(self) -> int:
        """Without the tables that say where they lie."""
        return sum(kv.full + kv.chunked for kv in (self.kv, self.draft_kv))

    @property
    def weights(self) -> int:
        return sum(self.target_weights.values()) + sum(self.draft_weights.values())

    @property
    def total(self) -> int:
        caches = self.kv.total + self.draft_kv.total
        return self.weights + caches + self.columns + self.activations + self.cuda_graphs


@dataclass(frozen=True)
class MemoryPlanner:
    """Plans for one pair, whose weights are counted once."""

    target: Llama4Config
    draft: DraftPlan | None
    run: Run
    vision: int = 0  # bytes of a tower in front of the target
    target_weights: Mapping[str, int] = field(init=False, compare=False)
    draft_weights: Mapping[str, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Raises CheckpointError where the draft does not fit the target."""
        model = empty_target(self.target, self.run)
        weights = weight_bytes(model, self.run.dtype)
        weights |= {"vision": self.vision} if self.vision else {}
        object.__setattr__(self, "target_weights", weights)
        draft = {} if self.draft is None else self._draft_weights(self.draft)
        object.__setattr__(self, "draft_weights", draft)

    def plan(self, context: int, batch: int = 1) -> MemoryPlan:
        """Raises ValueError for what the target cannot be asked."""
        longest = self.target.max_position_embeddings
        if not 1 <= context <= longest or batch < 1:
            raise ValueError(
                f"context, batch: must be 1..{longest} tokens and at least 1 sequence, "
                f"got {context} and {batch}"
            )
        kv, draft_kv = self._caches(context, batch)
        return MemoryPlan(
            context,
            batch,
            self.target_weights,
            self.draft_weights,
            kv,
            draft_kv,
            self._columns(context, batch),
            self._activations(batch),
            self._cuda_graphs(batch),
        )

    @property
    def usual_context(self) -> int:
        """What is planned for where nothing else is asked."""
        return min(CONTEXT, self.target.max_position_embeddings)

    def largest_context(self, memory: int, batch: int) -> int:
        """The most tokens per sequence that fit into `memory` bytes; 0: not even one."""
        longest = self.target.max_position_embeddings
        return _largest(longest, lambda context: self.plan(context, batch).total <= memory)

    def largest_batch(self, memory: int, context: int) -> int:
        """The most sequences of `context` tokens that fit into `memory` bytes; 0: not even one."""
        one = self.plan(context)
        each = one.kv.total + one.draft_kv.total
        most = max(0, memory - one.weights) // each
        return _largest(most, lambda batch: self.plan(context, batch).total <= memory)

    def kv_cache_bytes(self, plan: MemoryPlan, memory: int, origin: str) -> int:
        """What `memory` leaves for keys and values beside all else of the plan: sequences wait
        where that is less than the plan's batch needs. Raises ValueError where not one fits."""
        left = memory - (plan.total - plan.keys_and_values)
        if left < self.plan(plan.context).keys_and_values:
            self.check(plan, memory, origin)
        return left

    def check(self, plan: MemoryPlan, memory: int, origin: str) -> None:
        """Raises ValueError, which names what would fit, if the plan does not fit into `memory`."""
        if plan.total <= memory:
            return
        context = self.largest_context(memory, plan.batch)
        batch = self.largest_batch(memory, plan.context)
        fitting = [f"{context} tokens of context at batch {plan.batch}"] if context else []
        fitting += [f"a batch of {batch} at {plan.context} tokens"] if batch else []
        advice = f"what fits is {' or '.join(fitting)}"
        if not fitting:
            advice = (
                f"not even one token fits beside weights of {plan.weights / GIB:.2f} GiB: quantise "
                f"them or take a larger device"
            )
        raise ValueError(
            f"memory: {plan.context} tokens x {plan.batch} need {plan.total / GIB:.2f} GiB, and "
            f"{origin} is {memory / GIB:.2f} GiB; {advice}"
        )

    def _draft_weights(self, plan: DraftPlan) -> dict[str, int]:
        config, parts = plan.config, plan.parts
        check_fits(config, parts, self.target)
        communicator = self.run.draft_communicator
        check_draft_shard(config, parts, shard_of(communicator))
        draft = empty_draft(plan, replace(self.run, backend="eager"))
        tap_layers(config, empty_target(self.target, self.run))  # refuses what does not fit
        sizes = weight_bytes(draft, self.run.dtype)
        if not parts.head and config.draft_vocab_size < config.vocab_size:  # cut from the target's
            rows = config.draft_vocab_size * config.hidden_size
            sizes["head"] = rows * self.run.dtype.itemsize
        if self.run.shard.size > 1 and communicator is None:  # the target's own lie in parts
            whole = self.target.vocab_size * self.target.hidden_size * self.run.dtype.itemsize
            sizes |= {} if parts.embedding else {"embedding": whole}
            sizes |= {} if parts.head or "head" in sizes else {"head": whole}
        return sizes

    def _caches(self, context: int, batch: int) -> tuple[KVBytes, KVBytes]:
        """As `Decoding` allocates them: with room for the rows of the last step, and of those that
        the host learns too late not to have needed."""
        slots = self._slots(context)
        run, layers = self.run, range(self.target.num_hidden_layers)
        specs = [local_attention(self.target.attention(i), run.shard) for i in layers]
        draft_shard = shard_of(run.draft_communicator)
        own = []
        if self.draft is not None:
            own = [local_attention(self.draft.config.attention, draft_shard)]
        kv_dtype = self.run.kv_dtype
        return kv_bytes(specs, slots, batch, kv_dtype), kv_bytes(own, slots, batch, kv_dtype)

    def _slots(self, context: int) -> int:
        return context + slack(self.run.policy, self.run.lag)

    def _columns(self, context: int, batch: int) -> int:
        depth = 0 if self.run.policy is None else self.run.policy.depth
        num_taps = 0 if self.draft is None else self.draft.config.num_taps
        slots, width, meta = self._slots(context), self.target.hidden_size, torch.device("meta")
        columns = Batch(batch, slots, depth + 1, num_taps, width, self.run.dtype, meta).columns
        own_ids = self.run.shard.part(self.target.vocab_size)
        rules = RuleColumns(batch, range(own_ids.start, own_ids.stop), meta)
        rules.reserve(self.run.choice.rules)
        return sum(column.nbytes for column in (*columns, *rules.columns))

    def _cuda_graphs(self, batch: int) -> int:
        return graph_bytes(_round_bytes(self, batch)) if self.run.is_captured else 0

    def _activations(self, batch: int) -> int:
        """The larger of a prompt's longest pass and of verifying all sequences at once."""
        if self.run.backend == "eager":
            return 0
        prompt = activations(self, PREFILL_ROWS, False)
        return max(prompt, activations(self, batch * (self.run.num_drafted + 1), True))


@lru_cache(maxsize=256)
def activations(planner: MemoryPlanner, num_rows: int, all_logits: bool) -> int:
    """Of one pass of the target over `num_rows` rows, its taps included."""
    model = empty_target(planner.target, planner.run)
    if planner.draft is not None:
        model.set_aux_hidden_state_layers(tap_layers(planner.draft.config, model))
    return activation_bytes(model, planner.run.dtype, num_rows, all_logits)


@lru_cache(maxsize=256)
def _round_bytes(planner: MemoryPlanner, batch: int) -> int:
    pair = empty_pair(planner.target, planner.draft, planner.run)
    return round_bytes(*pair, planner.run.policy, batch, planner.run.choice)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1..most that fits, 0 if none does; whatever is below one that fits, fits."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
