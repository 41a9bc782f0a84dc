"""What EAGLE-3 asks of a target model: taps, and a pass over the rows of a step."""

from collections.abc import Collection
from typing import Protocol, runtime_checkable

from torch import Tensor

from aerie.llama4.cache import PagedKVCache
from aerie.llama4.kv_scales import KVCacheDtype
from aerie.llama4.model import Llama4ForCausalLM, Llama4Output
from aerie.llama4.step import Step


class Target(Protocol):
    """A text model, or a multimodal one around it: what generating and drafting start from."""

    def get_language_model(self) -> Llama4ForCausalLM: ...


@runtime_checkable
class SupportsEagle3(Protocol):
    """A target whose un-normed residual stream can be tapped at the input of chosen layers.

    Layer ids count inputs: 0 is the embedding, N the stream behind the last layer. vLLM's two names
    for the default ids, (2, N // 2, N - 3), are the same function.
    """

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None: ...

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]: ...

    def get_eagle3_aux_hidden_state_layers(self) -> tuple[int, ...]: ...

    def get_language_model(self) -> Llama4ForCausalLM: ...

    def get_input_embeddings(self, input_ids_T: Tensor) -> Tensor: ...

    def allocate_cache(
        self,
        max_length: int,
        num_sequences: int,
        *,
        max_step_rows: int,
        kv_cache_dtype: KVCacheDtype,
        num_pages: int | None,
    ) -> PagedKVCache: ...

    def __call__(
        self,
        input_ids_T: Tensor,
        step: Step,
        logit_rows: Tensor | None = None,
        inputs_embeds_TD: Tensor | None = None,
        aux_layers: Collection[int] | None = None,
    ) -> Llama4Output: ...
