"""What `bench/peers.py` has of a peer."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A function and what turns our arguments into its own."""

    op: Callable
    prepare: Callable[..., tuple]
