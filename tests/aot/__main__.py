"""Compiles without a GPU and reads the machine code.

    python -m tests.aot --only OP      the ops whose name contains OP, for all targets, as text
    python -m tests.aot --write        everything, into `bench/results/aot.md`
    python -m tests.aot TARGET [OP]    a JSON object per variant; what the two above are made of

A process compiles for one target, as Triton's interpreter must be off in it and the launch rules
ask PyTorch whether this is an AMD machine.
"""

import json
import sys
from dataclasses import asdict

import torch

from tests.aot.table import TABLE, compiled, described, rendered


def compile_all(name: str, only: str | None) -> None:
    if name.startswith("gfx"):
        torch.version.hip = "ahead of time"  # before the launch rules are imported
    from tests.aot.calls import CALLS, kinds
    from tests.aot.launches import variants
    from tests.aot.machine_code import facts_of
    from tests.aot.rules import TARGETS, broken_rules

    for variant in variants(CALLS, kinds(name), only):
        facts = facts_of(variant.compile(TARGETS[name]))
        broken = broken_rules(variant.kernel, name, facts)
        row = {
            "kernel": variant.kernel,
            "kind": variant.kind,
            "rows": variant.rows,
            "target": name,
            "broken": broken,
        }
        print(json.dumps(row | asdict(facts)), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        TABLE.write_text(rendered(compiled()))
    elif sys.argv[1] == "--only":
        print("\n".join(map(described, compiled(only=sys.argv[2]))))
    else:
        compile_all(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
