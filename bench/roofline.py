"""The roofline picture: our kernels under the ceilings measured with them. Needs matplotlib.

Left, ops that compute: TFLOP/s over FLOP per byte, under the copy bandwidth and the matmul rate.
Right, all ops: GB/s over the bytes of a call, under the copy bandwidth; small calls are latency.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

NEEDS = "--png needs matplotlib, which is not installed: pip install 'aerie[bench]'"
MARKERS = {"triton": "o", "eager": "x", "compile": "+"}


def draw(saved: dict[str, Any], path: Path) -> None:
    """Writes the picture of `saved`. Raises SystemExit where matplotlib is missing."""
    try:
        figure = import_module("matplotlib.figure").Figure(figsize=(12, 5), layout="constrained")
    except ImportError as error:
        raise SystemExit(NEEDS) from error
    rows = [row for row in saved["rows"] if row["status"] == "ok" and row["provider"] in MARKERS]
    if not rows:
        raise SystemExit("--png: no row of this file has a time")
    ceilings = saved["ceilings"]
    left, right = figure.subplots(1, 2)
    _computing(left, [row for row in rows if row["flops"]], ceilings)
    _moving(right, rows, ceilings)
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['versions']}, {rows[0]['commit']}")
    figure.savefig(path, dpi=150)


def _computing(axes: Any, rows: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    peak, slope = ceilings["matmul_tflop_s"], ceilings["copy_gb_s"] / 1e3  # TB/s
    ridge = peak / slope
    ends = [0.1, ridge, max(10 * ridge, 10)]
    axes.plot(ends, [min(peak, slope * x) for x in ends], color="black", label="measured ceilings")
    _scatter(axes, rows, lambda row: (row["flops"] / row["bytes"], row["tflop_s"]))
    _label(axes, "FLOP per byte", "TFLOP/s")


def _moving(axes: Any, rows: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    axes.axhline(ceilings["copy_gb_s"], color="black", label="measured copy")
    axes.axhline(ceilings["read_gb_s"], color="gray", linestyle="--", label="measured read")
    _scatter(axes, rows, lambda row: (row["bytes"], row["gb_s"]))
    _label(axes, "bytes of a call", "GB/s")


def _scatter(axes: Any, rows: list[dict[str, Any]], place: Any) -> None:
    """One colour per op, one marker per provider."""
    colour = {op: f"C{i % 10}" for i, op in enumerate(sorted({row["op"] for row in rows}))}
    named: set[str] = set()
    for row in rows:
        x, y = place(row)
        label = row["op"] if row["op"] not in named else None
        named.add(row["op"])
        axes.scatter(
            [x], [y], marker=MARKERS[row["provider"]], color=colour[row["op"]], label=label
        )


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y + "   (o triton, x eager, + compile)")
    axes.legend(fontsize=6)
