"""Compiles without a GPU and reads the machine code.

    python -m tests.aot --only OP      the ops whose name contains OP, for all targets, as text
    python -m tests.aot --write        compiles everything and writes `bench/results/aot.*`
    python -m tests.aot --update       compiles what changed and writes the same
    python -m tests.aot --check        compiles everything, compares, and writes nothing
    python -m tests.aot TARGET HOW [OP]    JSON objects; what the four above are made of

The test suite compiles what changed and a sixteenth of the rest, another one every day. A process
compiles for one target, as Triton's interpreter must be off in it.
"""

import json
import sys
from dataclasses import asdict
from datetime import date

from tests.aot.calls import BETWEEN, CALLS, SIZES, kinds
from tests.aot.launches import variants
from tests.aot.machine_code import facts_of
from tests.aot.proof import proven
from tests.aot.record import Record, differences, is_due
from tests.aot.rules import CHOSEN_FOR, TARGETS
from tests.aot.table import TABLE, described, rendered


def print_rows(target: str, how: str, only: str) -> None:
    """A JSON object per variant; `how` is "all", or "due": what changed and the sample of today."""
    record, today = Record.read(), date.today().toordinal()
    recorded = record.facts.get(target, {}) if record.is_current else {}
    found = variants(CALLS, kinds(target), SIZES, BETWEEN, CHOSEN_FOR[target], only)
    keys = [variant.fingerprint(TARGETS[target]) for variant in found]
    # under another version of Triton nothing is known, and the sample has to do
    is_new = {key: record.is_current and key not in recorded for key in keys}
    chosen = [i for i, k in enumerate(keys) if how == "all" or is_new[k] or is_due(k, today)]
    compiled = facts_of([found[i].compile(TARGETS[target]) for i in chosen])
    facts = recorded | {keys[i]: asdict(read) for i, read in zip(chosen, compiled, strict=True)}
    for key, variant in zip(keys, found, strict=True):
        row = {
            "kernel": variant.kernel,
            "kind": variant.kind,
            "rows": variant.rows,
            "target": target,
            "fingerprint": key,
            "recorded": recorded.get(key),
            "facts": facts.get(key),
        }
        print(json.dumps(row))


def main(arguments: list[str]) -> int:
    match arguments:
        case ["--only", op]:
            print("\n".join(map(described, proven("all", op))))
        case ["--write" | "--update" as mode]:
            rows = proven("all" if mode == "--write" else "due")
            assert all(row.facts for row in rows), "another version of Triton: use --write"
            Record.of(rows).write()
            TABLE.write_text(rendered(rows))
        case ["--check"]:
            rows = proven("all")
            found = [described(row) for row in rows if row.unnamed] + differences(rows)
            print("\n".join(found) or f"{len(rows)} variants, as recorded and within the rules")
            return bool(found)
        case [target, how, *only]:
            print_rows(target, how, "".join(only))
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
