"""The speculative configuration: the keys of vLLM's `--speculative-config`, checked at the door."""

import json
from dataclasses import dataclass, fields
from typing import Any

from aerie.eagle3.reading import AS_WRITTEN, KEYS, Reading

MAX_SPECULATIVE_TOKENS = 63  # with the root, a verified tree fits one 64-bit ancestor word per row


@dataclass(frozen=True)
class SpeculativeConfig:
    """How to draft. `model` is the draft's folder or hub id (None: the caller has one).

    The keys of `Reading` (`tap_convention`, ...) stand beside the others in the JSON.
    """

    method: str = "eagle3"
    model: str | None = None
    num_speculative_tokens: int = 4
    draft_tensor_parallel_size: int = 1
    reading: Reading = AS_WRITTEN

    def __post_init__(self) -> None:
        if self.method != "eagle3":
            raise ValueError(f"method: supported is 'eagle3', got {self.method!r}")
        if self.model is not None and not isinstance(self.model, str):
            raise ValueError(f"model: must be a folder or a hub id, got {self.model!r}")
        if self.model == "":
            raise ValueError("model: must be a folder or a hub id, got ''")
        check_num_speculative_tokens(self.num_speculative_tokens)
        if self.draft_tensor_parallel_size != 1 or self.draft_tensor_parallel_size is True:
            raise ValueError(
                "draft_tensor_parallel_size: must be 1 (the target's size), "
                f"got {self.draft_tensor_parallel_size!r}"
            )

    @classmethod
    def from_json(cls, text: str) -> "SpeculativeConfig":
        """Parses a JSON object. Raises ValueError on an unknown key or a value out of range."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"speculative config: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"speculative config: must be a JSON object, got {text!r}")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SpeculativeConfig":
        """From the parsed object. Errors as `from_json`."""
        if "tensor_parallel_size" in values:
            raise ValueError(
                "speculative config key 'tensor_parallel_size': the draft's size is set by "
                "'draft_tensor_parallel_size', the target's outside of the speculative config"
            )
        known = [field.name for field in fields(cls) if field.name != "reading"] + list(KEYS)
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(
                f"speculative config: unknown keys {unknown}; known are {', '.join(known)}"
            )
        own = {key: value for key, value in values.items() if key not in KEYS}
        reading = Reading.from_dict({k: v for k, v in values.items() if k in KEYS})
        return cls(**own, reading=reading)


def check_num_speculative_tokens(k: object) -> None:
    """Raises ValueError unless `k` is an integer within 1..MAX_SPECULATIVE_TOKENS."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_SPECULATIVE_TOKENS:
        raise ValueError(
            f"num_speculative_tokens: must be an integer 1..{MAX_SPECULATIVE_TOKENS}, got {k!r}"
        )
