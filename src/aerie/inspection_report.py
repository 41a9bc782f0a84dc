"""How an inspection is shown: a table, or one JSON object."""

from typing import Any

from aerie import plan
from aerie.inspection import Inspection
from aerie.plan import as_text, size


def as_rows(found: Inspection) -> dict[str, str]:
    """Two columns for the terminal."""
    rows = {"checkpoint": f"{found.kind} in {found.folder}", **found.facts}
    for decision in found.decisions:
        rows[decision.topic] = f"{decision.choice} ({decision.reason})"
    for name, group in found.groups.items():
        shown = ", ".join(f"{count:,} {kind}" for kind, count in group.values.items())
        rows[f"  {name}"] = f"{shown} = {size(group.nbytes)}"
    rows["weights"] = f"{found.num_values:,} values, {size(found.weight_bytes)} as stored"
    if found.memory is not None:
        rows["memory"] = f"{as_text(found.memory)}, in bfloat16 without activations"
    rows["problems"] = str(len(found.problems) or "none found")
    return rows


def as_dict(found: Inspection) -> dict[str, Any]:
    """The object `--json` prints."""
    decisions = {d.topic: {"choice": d.choice, "reason": d.reason} for d in found.decisions}
    groups = {n: {"values": dict(g.values), "bytes": g.nbytes} for n, g in found.groups.items()}
    return {
        "folder": str(found.folder),
        "kind": found.kind,
        "facts": found.facts,
        "decisions": decisions,
        "tensors": groups,
        "num_values": found.num_values,
        "weight_bytes": found.weight_bytes,
        "memory": None if found.memory is None else plan.as_dict(found.memory),
        "problems": found.problems,
    }
