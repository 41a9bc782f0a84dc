"""Rows of results as text: the aligned table of a terminal and the markdown of the README."""

from collections.abc import Sequence
from typing import Any

COLUMNS = (
    *("op", "case", "provider", "us", "p20-p80", "one shot", "launches", "cache"),
    *("GB/s", "TFLOP/s", "floor us", "% floor", "% read", "x eager"),
)
GENERATE_COLUMNS = ("benchmark", "host ms", "tok/s", "AL", "GB/s")
GENERATE_NOTES = ("tokens_per_second", "acceptance_length", "gb_per_second")
README_COLUMNS = ("op", "case", "µs", "p20-p80", "% of floor", "x eager", "x compile")
Row = dict[str, Any]


def shown(value: float | None) -> str:
    """Three digits, or a dash for what there is not."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def key(row: Row) -> tuple[str, str, str]:
    return row["op"], row["case"], row["provider"]


def speedup(rows: Sequence[Row], row: Row, over: str) -> float | None:
    """How many times faster `row` is than the same case of the provider `over`."""
    found = [r for r in rows if key(r) == (row["op"], row["case"], over) and r["status"] == "ok"]
    return found[0]["median_us"] / row["median_us"] if found else None


def percent(row: Row) -> float | None:
    """Percent of the floor; a warm call need not go to memory, so the floor is not its own."""
    return row["percent_of_floor"] if row["cold"] else None


def _cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    if row["status"] != "ok":
        return (*key(row), row["status"])
    spread = f"{shown(row['p20_us'])}-{shown(row['p80_us'])}"
    cache, timing = "cold" if row["cold"] else "warm", row["timing"].split()[0]
    return (
        *key(row),
        shown(row["median_us"]),
        spread,
        shown(row["single_shot_us"]),
        shown(row["launches"]),
        f"{cache} {timing}",
        shown(row["gb_s"]),
        shown(row["tflop_s"] or None),
        shown(row["floor_us"]),
        shown(percent(row)),
        shown(row["percent_of_read"] if row["cold"] else None),
        shown(speedup(rows, row, "eager")),
    )


def aligned(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; a short row's last cell (a reason) may stick out."""
    full = [columns, *(row for row in body if len(row) == len(columns))]
    widths = [max(len(row[i]) for row in full) for i in range(len(columns))]
    for i in range(3):
        widths[i] = max([widths[i], *(len(row[i]) for row in body)])
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in [columns, *body]
    ]
    return "\n".join(lines)


def where(rows: Sequence[Row]) -> str:
    """Device, driver, versions and commits of `rows` in one line."""
    names = ("device", "driver", "versions", "commit")
    seen = [sorted({str(row.get(name, "none")) for row in rows} - {"none"}) for name in names]
    return ", ".join(" and ".join(values) for values in seen if values)


def table(saved: dict[str, Any]) -> str:
    """Everything in a file of results, under lines that name device, versions, commit, ceilings."""
    rows, parts = saved.get("rows", []), []
    if rows:
        reached = {n: v for n, v in saved.get("ceilings", {}).items() if isinstance(v, float)}
        ceilings = ", ".join(f"{name} {shown(value)}" for name, value in reached.items())
        parts += [where(rows), f"ceilings: {ceilings}"]
        parts += [aligned(COLUMNS, [_cells(rows, row) for row in rows])]
    if generated := generate_entries(saved):
        body = [
            (name, shown(1e3 * seconds), *(shown(info.get(note)) for note in GENERATE_NOTES))
            for name, seconds, info in generated
        ]
        parts += [where([info for _, _, info in generated]), aligned(GENERATE_COLUMNS, body)]
    return "\n".join(parts) if parts else "no results"


def generate_entries(saved: dict[str, Any]) -> list[tuple[str, float, dict[str, Any]]]:
    """Name, median seconds and notes of the benchmarks that are not of one op."""
    entries = [e for e in saved.get("benchmarks", []) if "op" not in e["extra_info"]]
    return [(e["name"], e["stats"]["median"], e["extra_info"]) for e in entries]


def markdown(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kernels_markdown(results: Sequence[dict[str, Any]]) -> str:
    """What the kernels reach on every device that has timed them."""
    parts = []
    for saved in results:
        rows = saved.get("rows", [])
        ours = [row for row in rows if row["provider"] == "triton"]
        if timed := [row for row in ours if row["status"] == "ok"]:
            parts.append(f"{where(timed)}; medians of calls with rotated inputs in a graph:\n")
            parts.append(markdown(README_COLUMNS, [_readme_cells(rows, row) for row in timed]))
        refused = [row for row in ours if row["status"].startswith("refused")]
        parts += [f"\n{row['op']}, {row['case']}: {row['status']}." for row in refused]
    return "\n".join(parts) if parts else "No kernel has been timed on a GPU yet."


def _readme_cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    spread = f"{shown(row['p20_us'])}-{shown(row['p80_us'])}"
    over = [shown(speedup(rows, row, other)) for other in ("eager", "compile")]
    name = f"`{row['op']}`"
    return name, row["case"], shown(row["median_us"]), spread, shown(percent(row)), *over


def generate_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Tokens per second of plain and speculative decoding, and the held-out acceptance."""
    parts = []
    for saved in results:
        speeds = [e for e in generate_entries(saved) if "tokens_per_second" in e[2]]
        if speeds:
            (first, _, info), *_ = speeds
            base, against = info["tokens_per_second"], f"x {_provider(first)}"
            parts += ["", f"{where([info for _, _, info in speeds])}, medians:\n"]
            body = [_generate_cells(name, info, base) for name, _, info in speeds]
            parts += [markdown(("", "tokens/s", against, "acceptance length"), body)]
        accepted = [
            (info["kind"], *info["acceptance_per_position"], info["acceptance_length"])
            for _, _, info in generate_entries(saved)
            if "acceptance_per_position" in info
        ]
        if accepted:
            positions = map(str, range(1, len(accepted[0]) - 1))
            columns = ("accepted of held-out prompts, position", *positions, "length")
            body = [(name, *(f"{value:.2f}" for value in values)) for name, *values in accepted]
            parts += ["", markdown(columns, body)]
        batches = [info for _, _, info in generate_entries(saved) if "batch_ratio" in info]
        for info in batches:
            parts += [
                f"\n{info['batch']} prompts side by side, {info['kind']}: "
                f"{info['batch_tokens_per_second']:.0f} tokens/s, {info['batch_ratio']:.2f} times "
                f"one by one."
            ]
    return "\n".join(parts).strip()


def _generate_cells(name: str, info: dict[str, Any], base: float) -> tuple[str, ...]:
    speed, length = info["tokens_per_second"], info["acceptance_length"]
    return (
        _provider(name),
        f"{speed:.0f}",
        f"{speed / base:.2f}",
        f"{length:.2f}" if length != 1 else "",
    )


def scout_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Steps of Scout's shape, and what rounds would give at an imposed acceptance length."""
    parts = []
    for saved in results:
        if (scout := saved.get("scout")) is None:
            continue
        steps = [t for t in scout["times"] if t["what"] == "step" and t["ms"] is not None]
        columns = ("batch", "context", "rows", "ms")
        parts += [f"{scout['model']}; {where([scout])}:\n"]
        parts += [markdown(columns, [tuple(shown(t[name]) for name in columns) for t in steps])]
        if rates := scout["simulated"]:
            parts += ["\nSimulated: no draft was trained, the acceptance length is imposed:\n"]
            parts += [markdown(tuple(rates[0]), [tuple(map(shown, r.values())) for r in rates])]
    return "\n".join(parts) if parts else "A model of Scout's size has not been run yet."


def _provider(name: str) -> str:
    return name.split("[")[-1].removesuffix("]")
