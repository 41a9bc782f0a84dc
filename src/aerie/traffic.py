"""What `aerie plan` says of the traffic between ranks."""

from collections.abc import Mapping

from aerie.eagle3.communication_plan import Traffic, round_traffic
from aerie.eagle3.memory_plan import MemoryPlanner
from aerie.eagle3.speculation import SpeculativeConfig
from aerie.plan import size

ASSUMED_US = (5, 8)  # of one small sum over eight GPUs of a node; nobody has measured it here


def traffic_of(
    planner: MemoryPlanner, speculation: SpeculativeConfig, batch: int
) -> Mapping[str, Traffic]:
    """Of a greedy round; nothing for a target on one device."""
    run, draft = planner.run, planner.draft
    if run.shard.size == 1:
        return {}
    return round_traffic(
        planner.target,
        None if draft is None else draft.config,
        itemsize=run.dtype.itemsize,
        batch=batch,
        num_drafted=run.num_drafted,
        depth=speculation.policy.depth,
        draft_size=run.draft_size,
    )


def as_rows(traffic: Mapping[str, Traffic]) -> dict[str, str]:
    """Calls and payload; a time only as it is assumed."""
    if not traffic:
        return {}
    calls, nbytes = (sum(getattr(t, n) for t in traffic.values()) for n in ("calls", "nbytes"))
    low, high = (calls * us / 1000 for us in ASSUMED_US)
    assumed = f"{low:.2f}-{high:.2f} ms if one takes {ASSUMED_US[0]}-{ASSUMED_US[1]} us"
    rows = {"told a round": f"{calls} calls, {size(nbytes)} a rank; {assumed}, not measured"}
    return rows | {
        f"told:   {name}": f"{one.calls} calls, {size(one.nbytes)}" for name, one in traffic.items()
    }


def _size(nbytes: int) -> str:
    return size(nbytes) if nbytes >= 1024 else f"{nbytes} bytes"


def as_dict(traffic: Mapping[str, Traffic]) -> dict[str, dict[str, int]]:
    """For `--json`."""
    return {name: {"calls": t.calls, "bytes": t.nbytes} for name, t in traffic.items()}
