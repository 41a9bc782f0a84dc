"""The Llama 4 text model: the decoder stack, its head, and how it is loaded.

Parameter names are those of Hugging Face's checkpoints.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from aerie.kernels.backend import Backend, ResolvedBackend, pick, resolve
from aerie.kernels.embedding import embedding, embedding_ref
from aerie.kernels.linear import Linear
from aerie.kernels.module import Module
from aerie.llama4.cache import MAX_STEP_ROWS, PagedKVCache
from aerie.llama4.checkpoint import LoadOptions, Progress, Renaming, load_weights
from aerie.llama4.communicator import Communicator, agreed, communicator_of, shard_of
from aerie.llama4.config import Llama4Config
from aerie.llama4.decoder import Llama4Model
from aerie.llama4.fp8_layout import hold_fp8, take_kv_scales
from aerie.llama4.hub import resolve_folder
from aerie.llama4.kv_plan import PAGE_SIZE
from aerie.llama4.kv_scales import KVCacheDtype, cache_dtype
from aerie.llama4.packing import lay_out_for_eager
from aerie.llama4.quantization import (
    Quantization,
    Quantize,
    quantized_on_load,
    read_quantization,
)
from aerie.llama4.sharding import check_shard, local_attention
from aerie.llama4.step import Step
from aerie.llama4.stored_shards import rank_reader


@dataclass(frozen=True)
class Llama4Output:
    """`logits_TV` of the asked rows; `aux_hidden_states[i]` is [T, D], in ascending layer order.

    On one rank of several, V are the logits of its part of the vocabulary; the taps are whole.
    """

    logits_TV: Tensor
    aux_hidden_states: tuple[Tensor, ...]


RENAME = Renaming(
    prefixes={"language_model.": ""},
    ignored=("vision_model.", "multi_modal_projector."),
)


class Llama4ForCausalLM(Module):
    """A Llama 4 target that can be verified against and tapped (`SupportsEagle3`)."""

    def __init__(
        self,
        config: Llama4Config,
        backend: Backend = "auto",
        device: torch.device | str = "cpu",
        communicator: Communicator | None = None,
    ) -> None:
        """`device` is where the model will run; it decides what backend `auto` means.

        With a `communicator` this is one rank's part of the target. `config` is the whole one's.
        """
        super().__init__()
        self.config = config
        self.communicator = communicator
        shard = shard_of(communicator)
        check_shard(config, shard)
        self.backend: ResolvedBackend = resolve(backend, device)
        self.model = Llama4Model(config, self.backend, communicator)
        vocabulary = shard.width(config.vocab_size)
        self.lm_head = Linear(config.hidden_size, vocabulary, False, self.backend)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._aux_layers: tuple[int, ...] = ()
        self._pick_rows = pick(self.backend, embedding, embedding_ref)

    @classmethod
    def without_values(
        cls,
        config: Llama4Config,
        backend: Backend = "auto",
        device: torch.device | str = "cpu",
        quantization: Quantization | None = None,
        communicator: Communicator | None = None,
    ) -> "Llama4ForCausalLM":
        """The model on the meta device, laid out as it will be where it runs: on `device`."""
        with torch.device("meta"):
            model = cls(config, backend, device, communicator)
            if quantization is not None:
                hold_fp8(model, quantization)
            if model.backend == "eager":
                lay_out_for_eager(model)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: Backend = "auto",
        *,
        quantize: Quantize | None = None,
        quantize_linears: bool = False,
        revision: str | None = None,
        check_finite: bool = True,
        progress: Progress | None = None,
        group: ProcessGroup | DeviceMesh | None = None,
        expert_parallel: bool = False,
    ) -> "Llama4ForCausalLM":
        """Loads a Hugging Face folder, or a hub id (at a `revision`), text-only or the text part of
        a multimodal one.

        FP8 checkpoints (`llama4/quantization.py`) stay as they are stored. `quantize` makes the
        experts of an unquantised one FP8 while they are read, "fp8" with a scale per output
        channel, "fp8_block" per 128 x 128 block; `quantize_linears` the other projections too,
        but for router and head. Strict: every parameter must be present once, in the right shape
        and finite (unless `check_finite` is off), and nothing may be left over. `progress` is told
        bytes read and bytes in all. Raises CheckpointError listing all that is wrong.

        With a `group` of several processes each holds, and reads, its part of the target
        (`llama4/sharding.py`), with `expert_parallel` whole experts. All of them must come here;
        what one cannot load, none does.
        """
        communicator = communicator_of(group, expert_parallel)
        load = partial(
            cls._load,
            path,
            backend,
            quantize,
            quantize_linears,
            revision,
            LoadOptions(dtype, device, check_finite=check_finite, progress=progress),
            communicator,
        )
        return agreed(load, communicator)

    @classmethod
    def _load(
        cls,
        path: str | Path,
        backend: Backend,
        quantize: Quantize | None,
        quantize_linears: bool,
        revision: str | None,
        options: LoadOptions,
        communicator: Communicator | None,
    ) -> "Llama4ForCausalLM":
        folder = resolve_folder(path, revision)
        config = Llama4Config.from_pretrained(folder)
        quantization = read_quantization(folder)
        if quantize is not None:
            quantization = quantized_on_load(folder, quantization, quantize, quantize_linears)
        model = cls.without_values(config, backend, options.device, quantization, communicator)
        options = replace(
            options,
            quantize=quantize is not None,
            rank_reader=None if communicator is None else rank_reader(config, communicator.shard),
        )
        load_weights(model, folder, RENAME, options)
        if quantization is not None:
            take_kv_scales(model, folder, RENAME)
        return model

    def get_language_model(self) -> "Llama4ForCausalLM":
        """Itself; a multimodal target has one inside."""
        return self

    def get_input_embeddings(self, input_ids_T: Tensor) -> Tensor:
        """The ids' embeddings [T, D]."""
        return self.model.embed_tokens(input_ids_T)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations and of every weight that is not FP8."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        input_ids_T: Tensor,
        step: Step,
        logit_rows: Tensor | None = None,
        inputs_embeds_TD: Tensor | None = None,
        aux_layers: Collection[int] | None = None,
    ) -> Llama4Output:
        """One pass over the T rows of `step` (see `PagedKVCache.causal_step` and `tree_step`).

        `logit_rows` (int64) picks the rows whose logits [.., V] are wanted; all if None. The taps
        at `aux_layers`, or if None at those of `set_aux_hidden_state_layers`, are returned for all
        rows. `inputs_embeds_TD`, where images are among the rows, stands in place of the ids'
        embeddings. Raises ValueError unless there is an id for every row, and for other layers.
        """
        step.check_ids(input_ids_T)
        if aux_layers is not None:
            self._check_aux_layers(aux_layers)
        embeds_TD = inputs_embeds_TD
        if embeds_TD is None:
            embeds_TD = self.model.embed_tokens(input_ids_T)
        stack = self.model(embeds_TD, step, self._aux_layers if aux_layers is None else aux_layers)
        hidden_TD = stack.hidden_TD
        if logit_rows is not None:
            hidden_TD = self._pick_rows(logit_rows, hidden_TD)
        return Llama4Output(self.lm_head(hidden_TD), stack.aux_hidden_states)

    def allocate_cache(
        self,
        max_length: int,
        num_sequences: int = 1,
        page_size: int = PAGE_SIZE,
        max_step_rows: int = MAX_STEP_ROWS,
        kv_cache_dtype: KVCacheDtype = "auto",
        num_pages: int | None = None,
    ) -> PagedKVCache:
        """A cache for this model's layers, dtype and device; `max_step_rows` rows fit in a step.

        `kv_cache_dtype` "fp8" stores e4m3 codes, with the layers' `kv_scales`. Without `num_pages`
        every sequence has its pages from the start (`PagedKVCache`).
        """
        config, weight = self.config, self.lm_head.weight
        attentions = [layer.self_attn for layer in self.model.layers]
        return PagedKVCache(
            config.num_hidden_layers,
            local_attention(config.attention(0), shard_of(self.communicator)).num_kv_heads,
            config.head_dim,
            max_length,
            chunk_sizes=[attention.spec.chunk_size for attention in attentions],
            kv_scales=[attention.kv_scales for attention in attentions],
            max_step_rows=max_step_rows,
            num_sequences=num_sequences,
            num_pages=num_pages,
            page_size=page_size,
            dtype=cache_dtype(kv_cache_dtype, self.dtype),
            device=weight.device,
            backend=self.backend,
        )

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        """Taps the un-normed residual stream at the *input* of each of `layers` (0 .. num layers).

        Input to layer i is the output of layer i - 1, and `hidden_states[i]` in transformers, whose
        last is normed, as this one never is.
        """
        self._check_aux_layers(layers)
        self._aux_layers = tuple(layers)

    def _check_aux_layers(self, layers: Collection[int]) -> None:
        depth = self.config.num_hidden_layers
        if len(set(layers)) != len(layers) or not all(0 <= i <= depth for i in layers):
            raise ValueError(
                f"layers: must be distinct and within 0..{depth} (inputs of layers), got {layers}"
            )

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, int, int]:
        """(2, N // 2, N - 3): early, middle and late, as EAGLE-3's public heads were trained."""
        depth = self.config.num_hidden_layers
        return (2, depth // 2, depth - 3)

    get_eagle3_aux_hidden_state_layers = get_eagle3_default_aux_hidden_state_layers
