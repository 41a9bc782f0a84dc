"""One prompt, decoded as its tokens are asked for."""

from collections.abc import Sequence

from aerie.eagle3.draft import Eagle3Llama4ForCausalLM
from aerie.eagle3.drafter import Drafter
from aerie.eagle3.ends import Detokenize
from aerie.eagle3.generate import Decodings
from aerie.eagle3.interface import Target
from aerie.eagle3.parallel_draft import RemoteDraft
from aerie.eagle3.policies import Chain, Policy
from aerie.eagle3.rows import Pair
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.sequences import Request
from aerie.eagle3.streams import SingleStream
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_scales import KVCacheDtype


class Decoding(SingleStream):
    """One sequence being decoded. Iterating yields the accepted tokens in bursts."""

    def __init__(
        self,
        target: Target,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None = None,
        draft: Eagle3Llama4ForCausalLM | RemoteDraft | None = None,
        num_speculative_tokens: int = 4,
        eos_token_ids: Sequence[int] | None = None,
        drafter: Drafter | None = None,
        kv_cache_dtype: KVCacheDtype = "auto",
        *,
        policy: Policy | None = None,
        sampling: SamplingParams | None = None,
        detokenize: Detokenize | None = None,
        images: ImageFeatures | None = None,
        kv_cache_bytes: int | None = None,
        cuda_graph_bytes: int = 0,
    ) -> None:
        """`eos_token_ids` None means the checkpoint's own; `drafter` replaces the draft's chain.

        `policy` None is a chain of `num_speculative_tokens`. `kv_cache_dtype` is that of the
        target's cache and of the draft's. `sampling` None is greedy. The token limit is
        `max_new_tokens` or `sampling.max_tokens`. `images` stand at placeholders of the prompt.
        Of memory see `Decodings`.
        """
        target = target.get_language_model()
        request = Request.checked(
            target, prompt_ids, max_new_tokens, eos_token_ids, sampling, detokenize, images
        )
        policy = Chain(num_speculative_tokens) if policy is None else policy
        pair = Pair(target, draft, policy, drafter)
        memory = kv_cache_bytes, cuda_graph_bytes
        self.decodings = Decodings(pair, [request], 1, kv_cache_dtype, *memory)
        super().__init__(self.decodings)
