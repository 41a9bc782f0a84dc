"""`python -m bench.report FILE.json`: what pytest-benchmark saved, as one aligned table.

Times are medians: of the host call, and on a GPU also of the device (`device us`). GB/s and TFLOP/s
count what the operation must at least move and compute, so a slow kernel cannot look busy.
"""

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("benchmark", "host us", "device us", "GB/s", "TFLOP/s", "tok/s", "AL")


def rows(saved: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row of text per benchmark."""
    return [_row(entry) for entry in saved["benchmarks"]]


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    info, host_us = entry["extra_info"], 1e6 * entry["stats"]["median"]
    seconds = 1e-6 * info.get("device_us", host_us)
    return (
        entry["name"],
        f"{host_us:.1f}",
        _shown(info.get("device_us")),
        _shown(info.get("bytes", 0) / seconds / 1e9 or None),
        _shown(info.get("flops", 0) / seconds / 1e12 or None),
        _shown(info.get("tokens_per_second")),
        _shown(info.get("acceptance_length")),
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(saved: dict[str, Any]) -> str:
    """The aligned table under one line that names device, versions and commit."""
    body = [COLUMNS, *rows(saved)]
    widths = [max(len(row[i]) for row in body) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in body
    ]
    info = saved["benchmarks"][0]["extra_info"] if saved["benchmarks"] else {}
    head = ", ".join(str(info.get(key, "?")) for key in ("device", "versions", "commit"))
    return "\n".join([head, *(line.rstrip() for line in lines)])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
