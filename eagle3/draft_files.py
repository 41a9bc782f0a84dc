"""A draft's folder as read for one target: its config, what it brings, its tensors into a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aerie.eagle3.binding import check_fits, swap_input_halves
from aerie.eagle3.checkpoint import (
    OwnParts,
    check_is_dense,
    check_is_unquantised,
    own_parts,
    read_vocabulary_map,
    renaming,
    tensor_names,
)
from aerie.eagle3.config import Eagle3Config
from aerie.eagle3.reading import Reading
from aerie.eagle3.sharded_draft import check_draft_shard
from aerie.llama4.checkpoint import LoadOptions, load_weights
from aerie.llama4.config import Llama4Config
from aerie.llama4.hub import resolve_folder
from aerie.llama4.json_fields import read_fields
from aerie.llama4.sharding import Shard

if TYPE_CHECKING:
    from aerie.eagle3.draft import Eagle3Llama4ForCausalLM


@dataclass(frozen=True)
class DraftFiles:
    """`names` are those of its tensors in a draft; what it does not bring is the target's."""

    folder: Path
    config: Eagle3Config
    names: set[str]
    parts: OwnParts

    @classmethod
    def of(
        cls,
        path: str | Path,
        revision: str | None,
        target: Llama4Config,
        reading: Reading,
        shard: Shard,
    ) -> "DraftFiles":
        """Raises CheckpointError, with all that keeps it from serving this target."""
        folder = resolve_folder(path, revision)
        config = Eagle3Config.from_pretrained(folder, target.num_hidden_layers, reading)
        names = tensor_names(folder)
        parts = own_parts(names, config)
        check_fits(config, parts, target)
        check_draft_shard(config, parts, shard)
        return cls(folder, config, names, parts)

    def load_into(self, draft: "Eagle3Llama4ForCausalLM", options: LoadOptions) -> None:
        """Raises CheckpointError, with all that is wrong with the tensors."""
        folder, config, parts = self.folder, self.config, self.parts
        read_fields(
            {
                "layer": lambda: check_is_dense(self.names),
                "weights": lambda: check_is_unquantised(self.names),
                "tensors": lambda: load_weights(draft, folder, renaming(parts, config), options),
                "d2t": lambda: draft.d2t.copy_(read_vocabulary_map(folder, config)),
            }
        )
        if config.reading.input_order == "hidden_first":
            swap_input_halves(draft.midlayer.self_attn.qkv_proj.weight)
