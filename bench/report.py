"""`python -m bench.report [FILE.json ...]`: what the benches saved, as tables and a picture.

FILE.json            print its table (`--markdown`: the README's form)
--png PICTURE.png    draw the roofline of the first file (needs matplotlib)
--merge              put its rows into bench/results/<device>.json, by op, case and provider
--scout SCOUT.json   what `bench.scout` saved goes there too
--readme             rewrite the marked blocks of README.md from bench/results/
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.roofline import draw
from bench.tables import generate_markdown, kernels_markdown, key, scout_markdown, table

RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
BLOCKS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "kernels": kernels_markdown,
    "generate": generate_markdown,
    "scout": scout_markdown,
}


def committed_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All results but those of a run that was not kept (`*.local.json`)."""
    paths = sorted(path for path in folder.glob("*.json") if ".local" not in path.name)
    return [json.loads(path.read_text()) for path in paths]


def with_blocks(readme: str, results: Sequence[dict[str, Any]]) -> str:
    """`readme` with every marked block rewritten. Raises ValueError where a marker is missing."""
    for name, render in BLOCKS.items():
        start, stop = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if readme.count(start) != 1 or readme.count(stop) != 1:
            raise ValueError(f"README.md: must hold {start} and {stop} once each")
        before, rest = readme.split(start)
        readme = f"{before}{start}\n{render(results)}\n{stop}{rest.split(stop)[1]}"
    return readme


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the rows of `new`; a row that was merely skipped keeps the older numbers."""
    rows = {key(row): row for row in old.get("rows", [])}
    for row in new["rows"]:
        if not (row["status"].startswith("skipped") and key(row) in rows):
            rows[key(row)] = row
    scout = new.get("scout", old.get("scout"))
    return {"ceilings": new["ceilings"], "rows": [rows[name] for name in sorted(rows)]} | (
        {"scout": scout} if scout else {}
    )


def results_path(saved: dict[str, Any], folder: Path = RESULTS) -> Path:
    """bench/results/<device>.json, the device's name in lower case and dashes."""
    device = saved["rows"][0]["device"]
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def merge(saved: dict[str, Any], folder: Path = RESULTS) -> Path:
    path = results_path(saved, folder)
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(merged(old, saved), indent=1) + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--scout", type=Path)
    for flag in ("--markdown", "--merge", "--readme"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args(arguments)
    if options.png and not options.files:
        parser.error("--png: needs a FILE.json")
    files = [json.loads(path.read_text()) for path in options.files]
    if options.scout and files and options.scout.exists():
        files[0]["scout"] = json.loads(options.scout.read_text())
    for saved in files:
        both = [render([saved]) for render in BLOCKS.values()]
        print("\n".join(both) if options.markdown else table(saved))
        if options.merge:
            print(f"merged into {merge(saved)}")
    if options.png:
        draw(files[0], options.png)
    if options.readme:
        README.write_text(with_blocks(README.read_text(), committed_results()))


if __name__ == "__main__":
    main()
