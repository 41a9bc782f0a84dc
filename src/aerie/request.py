"""What `aerie generate` was asked for, checked: see `commands/generate_options.py`."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from aerie.eagle3.generate import MAX_BATCH_SIZE
from aerie.eagle3.sampling import SamplingParams
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.kernels.backend import Backend, resolve
from aerie.llama4.kv_scales import KVCacheDtype
from aerie.llama4.quantization import Quantize
from aerie.prompting import Asked


@dataclass(frozen=True)
class Request:
    """A checked request (`commands/generate_options.py`)."""

    model: str | Path
    revision: str | None
    draft: str | Path | None
    draft_revision: str | None
    prompt: str
    max_new_tokens: int
    sampling: SamplingParams
    bad_words: tuple[str, ...]
    speculation: SpeculativeConfig
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    kv_cache_dtype: KVCacheDtype
    quantize: Quantize | None
    quantize_linears: bool
    check: bool
    count_experts: bool = False
    images: tuple[Path, ...] = ()
    chat: bool = False
    lazy_vision: bool = False
    prompts: tuple[Asked, ...] = ()  # of a batch; `prompt` is the first
    max_batch_size: int = MAX_BATCH_SIZE
    memory_fraction: float | None = None
    cuda_graphs: bool = False
    tensor_parallel_size: int = 1
    expert_parallel: bool = False

    def sampling_with(self, tokenizer: Tokenizer) -> SamplingParams:
        """With the ids of bad words: a word is other tokens at the start of a text than behind a
        space, and both are forbidden."""
        words = [text for word in self.bad_words for text in (word, f" {word}")]
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in words]
        return replace(self.sampling, bad_words_ids=ids)


def check_can_capture(device: torch.device, backend: Backend, tensor_parallel_size: int) -> None:
    """Raises ValueError where rounds cannot be captured as CUDA graphs."""
    advice = "leave the option out"
    if device.type != "cuda":
        raise ValueError(f"--cuda-graphs: needs a GPU, the device is {device}; {advice}")
    if resolve(backend, device) != "triton":
        raise ValueError(f"--cuda-graphs: needs Triton's backend, got {backend!r}; {advice}")
    if tensor_parallel_size > 1:
        raise ValueError(
            "--cuda-graphs: a round of several ranks is not captured, got --tensor-parallel-size "
            f"{tensor_parallel_size}; {advice}"
        )


def device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device: {name!r} is no device ({error})") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: supported are cpu and cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name!r} asked, {torch.cuda.device_count()} GPUs are present")
    return device


def dtype_named(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
