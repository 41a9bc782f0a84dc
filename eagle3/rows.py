"""Where sequences stand: a row of the batch, pages in the caches, parameters in the sampler.

Everything is allocated here, before the first token: a request gets all pages it can need when it
joins, or waits. So memory runs out at the start or never.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerie.eagle3.batch import Batch
from aerie.eagle3.broadcast_drafter import FollowingDrafter, LeadingDrafter
from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import CachedDrafter, Drafter, NoDrafter
from aerie.eagle3.engine import PREFILL_ROWS
from aerie.eagle3.parallel_draft import RemoteDraft
from aerie.eagle3.policies import Policy
from aerie.eagle3.sampled_drafts import Draws
from aerie.eagle3.sampler import Sampler
from aerie.eagle3.sequences import Request
from aerie.kernels.tree_rows import MAX_TREE_ROWS
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.communicator import agreed, from_first
from aerie.llama4.kv_plan import PAGE_SIZE, pages_in_pool
from aerie.llama4.kv_scales import KVCacheDtype
from aerie.llama4.model import Llama4ForCausalLM
from aerie.llama4.upload import upload


@dataclass(frozen=True)
class Pair:
    """Who decodes: a target, a draft or another drafter or neither, and how they draft."""

    target: Llama4ForCausalLM
    draft: Eagle3Llama4ForCausalLM | RemoteDraft | None
    policy: Policy
    drafter: Drafter | None = None

    def __post_init__(self) -> None:
        if self.draft is not None and not self.draft.is_bound_to(self.target):
            raise ValueError(
                "draft: was loaded for another target, or is a copy; load it with this one, or "
                "call draft.bind(target)"
            )
        if isinstance(self.draft, Eagle3Llama4ForCausalLM):
            _check_was_not_moved(self.draft, self.target)
        if self.policy.verification == "rejection" and self.target.communicator is not None:
            raise ValueError(
                "verification: 'rejection' takes whole rows of probabilities, which a target that "
                "is cut over ranks never has; use 'match'"
            )

    @property
    def device(self) -> torch.device:
        return self.target.lm_head.weight.device

    @property
    def lag(self) -> int:
        return lag_on(self.device)

    @property
    def depth(self) -> int:
        return self.policy.depth if self._drafts else 0

    @property
    def slack(self) -> int:
        return slack(self.policy if self._drafts else None, self.lag)

    @property
    def _drafts(self) -> bool:
        return self.draft is not None or self.drafter is not None


def _check_was_not_moved(draft: Eagle3Llama4ForCausalLM, target: Llama4ForCausalLM) -> None:
    """Raises ValueError where `.to` was asked of one of the two, or left a cut head behind: their
    tensors meet."""
    meeting = [(draft.fc.weight, target.model.norm.weight)]
    if not draft.parts.head:  # cut out of the target's, so that neither's `.to` moves it
        meeting.append((draft.lm_head.weight, target.lm_head.weight))
    for own, its in meeting:
        if (own.dtype, own.device) != (its.dtype, its.device):
            raise ValueError(
                f"draft: is {own.dtype} on {own.device}, the target {its.dtype} on {its.device}; "
                f"move both alike, then call draft.bind(target)"
            )


def lag_on(device: torch.device) -> int:
    """Rounds that run before the host knows what an earlier one did."""
    return 1 if device.type == "cuda" else 0


def slack(policy: Policy | None, lag: int) -> int:
    """Slots behind the last token: rows of a round, and of rounds that were not needed."""
    num_rows, depth = (0, 0) if policy is None else (policy.num_rows, policy.depth)
    return num_rows + 1 + lag * (depth + 1)


class Rows:
    """Room for `capacity` sequences at a time, of texts that grow to `max_lengths` tokens.

    Its tensors belong to inference mode, whose views of them are the cheapest: 4 % of a pass of the
    embedded target on a CPU. So what writes them runs in that mode wherever it is called.
    """

    @torch.inference_mode()
    def __init__(
        self,
        pair: Pair,
        max_lengths: Sequence[int],
        capacity: int,
        kv_cache_dtype: KVCacheDtype = "auto",
        kv_cache_bytes: int | None = None,
    ) -> None:
        """`kv_cache_bytes` None is as much as the `capacity` longest texts need.

        Raises ValueError where one of them does not fit in.
        """
        target, device = pair.target, pair.device
        self.capacity, self.slack, self.device = capacity, pair.slack, device
        self._kv_cache_dtype: KVCacheDtype = kv_cache_dtype
        needs = sorted((length + pair.slack for length in max_lengths), reverse=True)
        pages = [-(-slots // PAGE_SIZE) for slots in needs]
        num_pages = sum(pages[:capacity])
        if kv_cache_bytes is not None:
            fitting = self._pages_within(kv_cache_bytes, pair, needs[0])
            num_pages = min(num_pages, from_first(fitting, target.communicator))
            if num_pages < pages[0]:
                raise ValueError(
                    f"kv_cache_bytes: a request of {needs[0]} tokens, drafts included, needs "
                    f"{pages[0]} pages of {PAGE_SIZE}, and {kv_cache_bytes} bytes hold "
                    f"{num_pages}; allow more memory or ask for fewer tokens"
                )
        self.cache, draft_cache = agreed(
            lambda: self._caches(pair, needs[0], num_pages), target.communicator
        )
        self.drafter = agreed(lambda: _drafter(pair, draft_cache), target.communicator)
        own = self.drafter.cache
        self.caches = [self.cache] if own is None else [self.cache, own]
        num_taps, width = len(self.drafter.tap_layers), target.config.hidden_size
        self.batch = Batch(
            capacity, needs[0], pair.depth + 1, num_taps, width, target.dtype, device
        )
        vocab_size = target.config.vocab_size
        self._communicator = target.communicator
        self.sampler = Sampler(
            self.batch.ids_BS, vocab_size, target.backend, device, self._communicator
        )
        if pair.policy.verification == "rejection" and isinstance(self.drafter, CachedDrafter):
            self.drafter.draws = Draws(self.drafter.draft, self.sampler)

    @property
    def num_used_pages(self) -> int:
        """Pages that sequences hold, in all pools."""
        pools = [pool for cache in self.caches for pool in cache.pools]
        return sum(pool.num_pages - pool.num_free_pages for pool in pools)

    def has_room_for(self, request: Request) -> bool:
        slots = request.max_length + self.slack
        has_room = all(cache.has_room_for(slots) for cache in self.caches)
        return from_first(has_room, self._communicator)

    def join(self, row: int, request: Request, num_cached: int = 0) -> None:
        """Row `row` is the request's, with all the pages it can need."""
        self.allot(row, request.max_length)
        self.begin(row, request, num_cached)

    @torch.inference_mode()
    def allot(self, row: int, max_length: int) -> None:
        """Pages of an empty row for a text of up to `max_length` tokens."""
        for cache in self.caches:
            cache.admit(row, max_length + self.slack)

    @torch.inference_mode()
    def begin(self, row: int, request: Request, num_cached: int) -> None:
        """The caches hold the first `num_cached` tokens of the prompt already."""
        self.batch.join(row, self.ids(request.prompt_ids), num_cached)
        end_ids, num_prompt = request.ends.eos_token_ids, len(request.prompt_ids)
        self.sampler.join(row, request.sampling, request.seed, end_ids, num_prompt)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """The sequence of row `source` goes on in row `target`, which has been left."""
        for cache in self.caches:
            cache.move(source, target)
        self.batch.move(source, target)
        self.sampler.move(source, target)

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """The row is idle, its pages are free."""
        for cache in self.caches:
            cache.release(row)
        self.idle(row)

    @torch.inference_mode()
    def idle(self, row: int) -> None:
        """The row keeps its pages, and what they hold."""
        self.batch.leave(row)

    def ids(self, tokens: Sequence[int]) -> Tensor:
        return upload(tokens, torch.int64, self.device)

    def _caches(
        self, pair: Pair, slots: int, num_pages: int
    ) -> tuple[PagedKVCache, PagedKVCache | None]:
        kind = self._kv_cache_dtype
        step_rows = max(PREFILL_ROWS, MAX_TREE_ROWS)
        cache = pair.target.allocate_cache(
            slots,
            self.capacity,
            max_step_rows=step_rows,
            kv_cache_dtype=kind,
            num_pages=num_pages,
        )
        if pair.draft is None or isinstance(pair.draft, RemoteDraft) or pair.drafter is not None:
            return cache, None
        return cache, pair.draft.allocate_cache(
            slots, self.capacity, kv_cache_dtype=kind, num_pages=num_pages
        )

    def _pages_within(self, num_bytes: int, pair: Pair, slots: int) -> int:
        """The most pages whose keys and values take no more: told by caches of one page."""
        small = [cache for cache in self._caches(pair, slots, 1) if cache is not None]
        pools = [pool for cache in small for pool in cache.pools]

        def bytes_of(num_pages: int) -> int:
            return sum(
                (pool.k_LRCGK.nbytes + pool.v_LRCGK.nbytes)
                * pages_in_pool(pool.plan, self.capacity, num_pages)
                for pool in pools
            )

        most = num_bytes // max(1, bytes_of(1))
        most = max(most, self.capacity * -(-slots // PAGE_SIZE))
        return bisect_right(range(1, most + 1), num_bytes, key=bytes_of)


def _drafter(pair: Pair, cache: PagedKVCache | None) -> Drafter:
    """The pair's own, or its policy's; a draft that is whole beside a cut target has followers."""
    communicator, draft = pair.target.communicator, pair.draft
    if pair.drafter is not None or draft is None:
        return pair.drafter or NoDrafter()
    if isinstance(draft, RemoteDraft):
        assert communicator is not None
        return FollowingDrafter(pair.policy, communicator)
    assert cache is not None
    drafter = pair.policy.drafter(draft, cache, draft.tap_layers(pair.target))
    if communicator is None or draft.communicator is not None:
        return drafter
    return LeadingDrafter(drafter, pair.policy, communicator)
