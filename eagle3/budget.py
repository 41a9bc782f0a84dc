"""How much memory a decoding may take beside the weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Bytes of keys and values at most (None: as much as the requests need), and of rounds that are
    captured as CUDA graphs (0: none are)."""

    kv_cache_bytes: int | None = None
    cuda_graph_bytes: int = 0
