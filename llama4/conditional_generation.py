"""A multimodal Llama 4: the text model with images in front of its embeddings.

Everything EAGLE-3 asks of a target (`SupportsEagle3`) is the language model's, reached through
`get_language_model()` or delegated. An image costs one pass of the tower, before its prompt is
read; after that its features are rows like any other (`image_features`).
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from aerie.kernels.backend import Backend
from aerie.llama4.cache import MAX_STEP_ROWS, PagedKVCache
from aerie.llama4.checkpoint import Progress
from aerie.llama4.hub import resolve_folder
from aerie.llama4.image_features import ImageFeatures, merge_multimodal_embeddings
from aerie.llama4.kv_plan import PAGE_SIZE
from aerie.llama4.kv_scales import KVCacheDtype
from aerie.llama4.model import Llama4ForCausalLM, Llama4Output
from aerie.llama4.multimodal_config import MultimodalConfig
from aerie.llama4.quantization import Quantize
from aerie.llama4.step import Step
from aerie.llama4.vision import VisionTower


class Llama4ForConditionalGeneration(nn.Module):
    """A language model, and a vision tower that may be read at the first image only."""

    def __init__(
        self,
        language_model: Llama4ForCausalLM,
        config: MultimodalConfig,
        vision: VisionTower | Callable[[], VisionTower],
    ) -> None:
        """`vision` as a function is called when the first image comes."""
        super().__init__()
        self.config = config
        self.language_model = language_model
        self._tower = vision if isinstance(vision, VisionTower) else None
        self._read_tower = None if isinstance(vision, VisionTower) else vision

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
        lazy_vision: bool = False,
    ) -> "Llama4ForConditionalGeneration":
        """Loads a multimodal Hugging Face folder, or a hub id (at a `revision`).

        With `lazy_vision` the tower's tensors are only checked, by their headers, and read when the
        first image comes. The other arguments are the text model's, as in `Llama4ForCausalLM`: the
        tower keeps its own dtype. Raises CheckpointError, for the tower before the text is read.
        """
        folder = resolve_folder(path, revision)
        VisionTower.check(folder, MultimodalConfig.from_pretrained(folder))
        language_model = Llama4ForCausalLM.from_pretrained(
            folder,
            dtype,
            device,
            backend,
            quantize=quantize,
            quantize_linears=quantize_linears,
            check_finite=check_finite,
            progress=progress,
        )
        return cls.around(
            language_model, folder, lazy_vision=lazy_vision, check_finite=check_finite
        )

    @classmethod
    def around(
        cls,
        language_model: Llama4ForCausalLM,
        folder: Path,
        *,
        lazy_vision: bool = False,
        check_finite: bool = True,
    ) -> "Llama4ForConditionalGeneration":
        """Puts the vision tower of `folder` in front of its text model, which is loaded already."""
        config = MultimodalConfig.from_pretrained(folder)
        VisionTower.check(folder, config)
        device = language_model.lm_head.weight.device
        read = partial(VisionTower.from_pretrained, folder, config, device, check_finite)
        return cls(language_model, config, read if lazy_vision else read())

    @property
    def vision(self) -> VisionTower:
        """The tower, read now if it has not been. Raises CheckpointError."""
        if self._tower is None:
            assert self._read_tower is not None
            self._tower = self._read_tower()
        return self._tower

    @property
    def has_read_vision(self) -> bool:
        return self._tower is not None

    def get_language_model(self) -> Llama4ForCausalLM:
        return self.language_model

    def image_features(
        self, prompt_ids: Sequence[int], pixel_values_NCHW: Tensor | None
    ) -> ImageFeatures | None:
        """The features of a prompt's tiles, in the order of its placeholders; None without any.

        Raises ValueError unless the prompt holds `tokens_per_tile` placeholders for each tile,
        before the tower runs.
        """
        per_tile, image = self.config.tokens_per_tile, self.config.image_token_id
        size = self.config.image_size
        if pixel_values_NCHW is None:
            pixel_values_NCHW = torch.empty(0, 3, size, size)
        tiles = pixel_values_NCHW.shape[0]
        if pixel_values_NCHW.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values: must be [tiles, 3, {size}, {size}], "
                f"got {list(pixel_values_NCHW.shape)}"
            )
        placeholders = list(prompt_ids).count(image)
        if placeholders != tiles * per_tile:
            raise ValueError(
                f"images: {placeholders} placeholders (id {image}) in the prompt, but {tiles} "
                f"tiles of {per_tile} features are {tiles * per_tile}; every placeholder takes one"
            )
        if tiles == 0:
            return None
        features = self.vision(pixel_values_NCHW)
        rows_FD = features.flatten(0, 1).to(self.language_model.dtype)
        return ImageFeatures.of_prompt(prompt_ids, [rows_FD], image)

    def get_multimodal_embeddings(self, pixel_values_NCHW: Tensor) -> tuple[Tensor, ...]:
        """One [tokens per tile, D] for each tile, in the text model's dtype."""
        features = self.vision(pixel_values_NCHW)
        return features.to(self.language_model.dtype).unbind(0)

    def get_input_embeddings(
        self,
        input_ids_T: Tensor,
        multimodal_embeddings: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The ids' embeddings [T, D], the image token's rows overwritten in order.

        Raises ValueError, with both numbers, unless there is a feature for every placeholder. None
        leaves them their text embedding.
        """
        embeds_TD = self.language_model.get_input_embeddings(input_ids_T)
        if multimodal_embeddings is None:
            return embeds_TD
        return merge_multimodal_embeddings(
            input_ids_T, embeds_TD, multimodal_embeddings, self.config.image_token_id
        )

    def forward(
        self,
        input_ids_T: Tensor,
        step: Step,
        logit_rows: Tensor | None = None,
        inputs_embeds_TD: Tensor | None = None,
        aux_layers: Collection[int] | None = None,
    ) -> Llama4Output:
        """As `Llama4ForCausalLM.forward`."""
        return self.language_model(input_ids_T, step, logit_rows, inputs_embeds_TD, aux_layers)

    def allocate_cache(
        self,
        max_length: int,
        num_sequences: int = 1,
        page_size: int = PAGE_SIZE,
        max_step_rows: int = MAX_STEP_ROWS,
        kv_cache_dtype: KVCacheDtype = "auto",
        num_pages: int | None = None,
    ) -> PagedKVCache:
        """As `Llama4ForCausalLM.allocate_cache`."""
        return self.language_model.allocate_cache(
            max_length, num_sequences, page_size, max_step_rows, kv_cache_dtype, num_pages
        )

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.language_model.set_aux_hidden_state_layers(layers)

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, int, int]:
        return self.language_model.get_eagle3_default_aux_hidden_state_layers()

    get_eagle3_aux_hidden_state_layers = get_eagle3_default_aux_hidden_state_layers
