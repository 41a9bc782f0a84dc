"""The Eagle3 draft: one decoder layer that predicts the target's next tokens from its states.

    h = fc(concat(taps))                                   once per committed row
    a = concat(input_layernorm(embed(next token)), hidden_norm(h))
    r = h + attention(a);  pre = r + mlp(post_attention_layernorm(r))
    draft logits = lm_head(norm(pre));  the next level's h is `pre`

EAGLE-3 (arXiv 2503.01840), section 3.1, in the layout of its published checkpoints: the head sees
the normalised vector, the next level the un-normalised one. Row i holds h of position i and the
token of position i + 1, stands at position and slot i, and predicts position i + 2.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from aerie.eagle3.binding import (
    Shared,
    draft_head,
    is_copy,
    sharing_decisions,
    tap_layers,
)
from aerie.eagle3.checkpoint import OwnParts, optional_tensors
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.decoder_layer import Eagle3DecoderLayer
from aerie.eagle3.draft_files import DraftFiles
from aerie.eagle3.interface import Target
from aerie.eagle3.reading import AS_WRITTEN, Reading, log_decisions
from aerie.eagle3.sharded_draft import draft_reader, merged, own_map
from aerie.kernels.aux_projection import AuxProjection, JointNorm, TapNorm
from aerie.kernels.backend import Backend, ResolvedBackend, pick, resolve
from aerie.kernels.draft_vocab import DraftTokens, draft_vocab, draft_vocab_ref
from aerie.kernels.embedding import Embedding
from aerie.kernels.linear import Linear
from aerie.kernels.module import Module
from aerie.kernels.rms_norm import RMSNorm
from aerie.kernels.rotation import Rotation, rotation, rotation_ref
from aerie.llama4.cache import PagedKVCache
from aerie.llama4.checkpoint import LoadOptions, Progress
from aerie.llama4.communicator import Communicator, shard_of
from aerie.llama4.image_features import ImageFeatures
from aerie.llama4.kv_plan import PAGE_SIZE
from aerie.llama4.kv_scales import KVCacheDtype, cache_dtype
from aerie.llama4.packing import lay_out_for_eager
from aerie.llama4.sharded_modules import residual_norm, token_embedding
from aerie.llama4.step import Step

OWN_HEAD = OwnParts(embedding=False, head=True)


@dataclass(frozen=True)
class DraftOutput:
    """`post_norm_TD` feeds the head, `next_hidden_TD` the next level (un-normed by default)."""

    post_norm_TD: Tensor
    next_hidden_TD: Tensor


class Eagle3Llama4ForCausalLM(Module):
    """An Eagle3 draft for a Llama 4 target; parameter names are those of raw checkpoints."""

    d2t: Tensor
    inv_freq: Tensor
    embed_tokens: Embedding  # its own or the target's, as the head; see `bind`
    lm_head: Linear

    def __init__(
        self,
        config: Eagle3Config,
        backend: Backend = "auto",
        device: torch.device | str = "cpu",
        parts: OwnParts = OWN_HEAD,
        communicator: Communicator | None = None,
    ) -> None:
        """`device` is where the draft will run; it decides what backend `auto` means. What `parts`
        leaves out comes from the target when the draft is bound. With a `communicator` this is one
        rank's part of the draft."""
        super().__init__()
        self.config = config
        self.parts = parts
        self.communicator, shard = communicator, shard_of(communicator)
        self.backend: ResolvedBackend = resolve(backend, device)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = AuxProjection(
            config.target_hidden_size, config.num_taps, width, False, self.backend
        )
        self._add_feature_norms()
        self.midlayer = Eagle3DecoderLayer(config, self.backend, communicator)
        self.norm = residual_norm(width, eps, self.backend, communicator)
        if parts.embedding:
            vocabulary = config.vocab_size
            self.embed_tokens = token_embedding(vocabulary, width, self.backend, communicator)
        if parts.head:
            head_rows = shard.width(config.draft_vocab_size)
            self.lm_head = Linear(width, head_rows, False, self.backend)
        with torch.device("cpu"):  # these must exist even while the rest is built on meta
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            inv_freq_J = config.rope.frequencies(config.attention.head_dim)
        self.register_buffer("inv_freq", inv_freq_J, persistent=False)
        self._rotation = pick(self.backend, rotation, rotation_ref)
        self._draft_vocab = pick(self.backend, draft_vocab, draft_vocab_ref)

    def _add_feature_norms(self) -> None:
        """Named as in checkpoints. They only hold weights: `fc` applies them while it reads."""
        config, width = self.config, self.config.target_hidden_size
        if config.feature_norm == "joint":
            self.input_norm = RMSNorm(config.num_taps * width, config.rms_norm_eps, self.backend)
        if config.feature_norm == "per_tap":
            norms = [
                RMSNorm(width, config.rms_norm_eps, self.backend) for _ in range(config.num_taps)
            ]
            self.fc_norm = cast("Sequence[RMSNorm]", nn.ModuleList(norms))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        target: Target,
        backend: Backend | None = None,
        reading: Reading = AS_WRITTEN,
        *,
        revision: str | None = None,
        progress: Progress | None = None,
    ) -> "Eagle3Llama4ForCausalLM":
        """Loads a draft of any format and binds it to `target`: its embedding, dtype, device, taps.

        `reading` overrides what the files say, `revision` pins a hub id. Strict like the target's
        loader. Raises CheckpointError listing all that is wrong.
        """
        draft = cls.read(path, target, backend, reading, revision=revision, progress=progress)
        draft.bind(target)
        return draft

    @classmethod
    def read(
        cls,
        path: str | Path,
        target: Target,
        backend: Backend | None = None,
        reading: Reading = AS_WRITTEN,
        *,
        revision: str | None = None,
        progress: Progress | None = None,
        communicator: Communicator | None = None,
    ) -> "Eagle3Llama4ForCausalLM":
        """Loads a draft that is still to be bound; with a `communicator`, one rank's part of it."""
        target, shard = target.get_language_model(), shard_of(communicator)
        files = DraftFiles.of(path, revision, target.config, reading, shard)
        config, device = files.config, target.lm_head.weight.device
        with torch.device("meta"):
            draft = cls(config, backend or target.backend, device, files.parts, communicator)
        if draft.backend == "eager":
            lay_out_for_eager(draft)
        reader = None if communicator is None else draft_reader(config, shard)
        optional = optional_tensors(config)
        options = LoadOptions(target.dtype, device, optional, progress=progress, rank_reader=reader)
        files.load_into(draft, options)
        log_decisions(config.decisions, files.folder)
        log_decisions(sharing_decisions(config, draft.parts, target.config), files.folder)
        return draft

    def bind(self, target: Target, shared: Shared | None = None) -> None:
        """Takes what the draft shares from the target, and checks that it can be tapped as asked.

        The target owns what is shared: registered here, it would be moved and saved with the draft.
        Where a whole draft drafts for a target that is cut, it is given `shared`.
        """
        target = target.get_language_model()
        target.set_aux_hidden_state_layers(self.tap_layers(target))
        if target.communicator is not self.communicator and shared is None:
            raise ValueError(
                "target: is one rank's part of a model; load its draft with "
                "aerie.eagle3.parallel_draft.load_parallel_draft"
            )
        shared = shared or Shared(target.model.embed_tokens, target.lm_head)
        if self.parts.embedding and is_copy(self.embed_tokens, shared.embedding, self.communicator):
            del self.embed_tokens
            self.parts = replace(self.parts, embedding=False)
        if not self.parts.embedding:
            object.__setattr__(self, "embed_tokens", shared.embedding)
        if not self.parts.head:
            assert shared.head is not None
            is_whole = self.config.draft_vocab_size == self.config.vocab_size
            head = shared.head if is_whole else draft_head(shared.head, self.d2t, self.backend)
            object.__setattr__(self, "lm_head", head)
        if self.communicator is not None:
            self._own_d2t = own_map(self.d2t, self.communicator.shard)
        object.__setattr__(self, "_target", weakref.ref(target))

    def __getstate__(self) -> dict[str, Any]:
        """What is the draft's own: a copy, or what was pickled, is still to be bound."""
        shared = {"_target"}
        if not self.parts.embedding:
            shared.add("embed_tokens")
        if not self.parts.head:
            shared.add("lm_head")
        return {name: value for name, value in self.__dict__.items() if name not in shared}

    def is_bound_to(self, target: Target) -> bool:
        """Whether this is the target whose matrices and taps the draft was given."""
        bound = getattr(self, "_target", None)
        return bound is not None and bound() is target.get_language_model()

    def tap_layers(self, target: Target) -> tuple[int, ...]:
        """The config's tap ids, or the target's default. Raises CheckpointError if unusable."""
        return tap_layers(self.config, target.get_language_model())

    def combine_hidden_states(self, aux_hidden_states: Sequence[Tensor]) -> Tensor:
        """fc over the taps (each [T, target width]); their concatenation is never built."""
        eps = self.config.rms_norm_eps
        match self.config.feature_norm:
            case "joint":
                return self.fc(aux_hidden_states, JointNorm(self.input_norm.weight, eps))
            case "per_tap":
                weights = tuple(norm.weight for norm in self.fc_norm)
                return self.fc(aux_hidden_states, TapNorm(weights, eps))
        return self.fc(aux_hidden_states)

    def forward(
        self,
        input_ids_T: Tensor,
        hidden_states_TD: Tensor,
        step: Step,
        inputs_embeds_TD: Tensor | None = None,
        turns: Rotation | None = None,
    ) -> DraftOutput:
        """One pass: each row takes its hidden state and the token of the *next* position.

        `inputs_embeds_TD`, where that token is an image's, stands in place of its embeddings.
        `turns` are those of the step's positions, where a caller has them (`rotation`). Raises
        ValueError unless there is an id for every row of `step`.
        """
        step.check_ids(input_ids_T)
        turns = turns or self.rotation(step.rows.positions_T)
        table_VD = self.embed_tokens.weight
        if inputs_embeds_TD is None and self.communicator is not None:
            inputs_embeds_TD = self.embed_tokens(input_ids_T)
        if inputs_embeds_TD is not None:  # a table of its own, read row by row
            table_VD = inputs_embeds_TD
            input_ids_T = torch.arange(len(table_VD), device=table_VD.device)
        stream = self.midlayer(input_ids_T, table_VD, hidden_states_TD, turns, step)
        last = self.norm.add(stream.delta_TD, stream.residual_TD)
        next_hidden_TD = last.normed_TD if self.config.norm_output else last.residual_TD
        return DraftOutput(last.normed_TD, next_hidden_TD)

    def rotation(self, positions_T: Tensor) -> Rotation:
        """Cosines and sines of rows' positions."""
        return self._rotation(positions_T, self.inv_freq)

    def merged_embeddings(
        self, next_ids_T: Tensor, start: int, images: ImageFeatures | None
    ) -> Tensor | None:
        """What the rows from slot `start` on see: their tokens' embeddings, and image features
        where an image's are. None if there are none, or this draft sees placeholders as text.
        """
        first = start + 1  # a row carries the token of the next position
        if images is None or self.config.draft_multimodal == "text":
            return None
        if not images.reach(first, first + len(next_ids_T)):
            return None
        return images.over(self.embed_tokens(next_ids_T), first)

    def top_tokens(self, post_norm_TD: Tensor, k: int) -> DraftTokens:
        """The k likeliest next tokens of each row as target ids, with draft log-probabilities."""
        scale, head_UD = self.config.logit_scale, self.lm_head.weight
        if self.communicator is None:
            return self._draft_vocab(post_norm_TD, head_UD, self.d2t, k, logit_scale=scale)
        own = self._draft_vocab(post_norm_TD, head_UD, self._own_d2t, k, logit_scale=scale)
        return merged(own, self.communicator)

    def compute_draft_logits(self, post_norm_TD: Tensor) -> Tensor:
        """[T, U] logits over the draft vocabulary."""
        return self.lm_head(post_norm_TD) * self.config.logit_scale

    def allocate_cache(
        self,
        max_length: int,
        num_sequences: int = 1,
        page_size: int = PAGE_SIZE,
        kv_cache_dtype: KVCacheDtype = "auto",
        num_pages: int | None = None,
    ) -> PagedKVCache:
        """A one-layer cache in this draft's dtype (or of FP8 codes) and on its device.

        Raises ValueError beyond a sliding window that the draft was trained with: up to its length
        all rows are visible either way, further on the logits would not be the draft's.
        """
        window = self.config.attention_window
        if window is not None and max_length > window:
            raise ValueError(
                f"max_length: {max_length} exceeds the draft's sliding window of {window}, which "
                f"is not implemented; shorten prompt and output or decode without this draft"
            )
        attention, weight = self.midlayer.self_attn.spec, self.lm_head.weight
        return PagedKVCache(
            1,
            attention.num_kv_heads,
            attention.head_dim,
            max_length,
            kv_scales=[self.midlayer.self_attn.kv_scales],
            num_sequences=num_sequences,
            num_pages=num_pages,
            page_size=page_size,
            dtype=cache_dtype(kv_cache_dtype, weight.dtype),
            device=weight.device,
            backend=self.backend,
        )
