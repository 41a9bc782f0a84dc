"""How an outcome is shown: one JSON object, or a small table."""

from dataclasses import fields
from statistics import median
from typing import Any

from rich.table import Table

from aerie.eagle3.graphs import GRAPH
from aerie.eagle3.stats import Round, Stats
from aerie.run import Outcome


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The object `--json` prints."""
    result: dict[str, Any] = {"text": outcome.text, "token_ids": outcome.tokens}
    if outcome.identical is not None:
        result["identical"] = outcome.identical
    result["finish_reason"] = outcome.finish_reason
    if outcome.error is not None:
        result["error"] = outcome.error
    if outcome.seed is not None:
        result["seed"] = outcome.seed
    result["stats"] = stats_as_dict(outcome.stats)
    if outcome.distinct_experts is not None:
        result["distinct_experts_per_layer"] = outcome.distinct_experts
    if outcome.plain_stats is not None:
        result["plain_stats"] = stats_as_dict(outcome.plain_stats)
    return result


def stats_as_dict(stats: Stats) -> dict[str, Any]:
    """Names as vLLM's bench where it has them; times are totals in milliseconds, but in `rounds`,
    whose lists have an entry per round."""
    graphs = {"cuda_graphs": _launches(stats)} if stats.launches else {}
    return graphs | {
        "num_tokens": stats.num_tokens,
        "num_target_passes": stats.num_target_passes,
        "num_drafts": stats.num_drafts,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_accepted_tokens": stats.num_accepted_tokens,
        "acceptance_length": stats.acceptance_length,
        "acceptance_per_position": stats.acceptance_per_position,
        "conditional_acceptance_per_position": stats.conditional_acceptance_per_position,
        "acceptance_histogram": stats.acceptance_histogram,
        "tokens_per_target_pass": stats.tokens_per_target_pass,
        "tokens_per_second": stats.tokens_per_second,
        "prefill_ms": stats.prefill_ms,
        "draft_ms": stats.draft_ms,
        "verify_ms": stats.verify_ms,
        "other_ms": stats.other_ms,
        "rounds": {
            part.name: [round(getattr(one, part.name), 3) for one in stats.rounds]
            for part in fields(Round)
        },
    }


def _launches(stats: Stats) -> dict[str, Any]:
    """Rounds that were replayed, and the others by the reason why not."""
    eager = {why: count for why, count in stats.launches.items() if why != GRAPH}
    return {"num_replayed": stats.launches[GRAPH], "num_eager": eager}


def as_table(outcome: Outcome) -> Table:
    """The statistics under the streamed text."""
    stats = outcome.stats
    rows = {
        "tokens": f"{stats.num_tokens} ({outcome.finish_reason})",
        "target passes": f"{stats.num_target_passes}, the prompt's included",
        "acceptance length": f"{stats.acceptance_length:.2f} tokens per draft, bonus included",
        "drafted, accepted": f"{stats.num_draft_tokens}, {stats.num_accepted_tokens}",
        "tokens per target pass": f"{stats.tokens_per_target_pass:.2f}",
        "accepted at position": _percentages(stats.acceptance_per_position),
        "  given the one before": _percentages(stats.conditional_acceptance_per_position),
        "drafts by accepted tokens": _histogram(stats.acceptance_histogram),
        "tokens per second": f"{stats.tokens_per_second:.1f}",
        "ms prefill / draft / verify / other": (
            f"{stats.prefill_ms:.0f} / {stats.draft_ms:.0f} / "
            f"{stats.verify_ms:.0f} / {stats.other_ms:.0f}"
        ),
        "ms of the median round": _median_round(stats.rounds),
    }
    if stats.launches:
        told = _launches(stats)
        others = [f"{count} not: {why}" for why, count in told["num_eager"].items()]
        rows["rounds from CUDA graphs"] = "; ".join([str(told["num_replayed"]), *others])
    if outcome.distinct_experts is not None:
        rows["distinct experts of a layer"] = ", ".join(
            f"{count:.2f} at {num_rows} rows"
            for num_rows, count in outcome.distinct_experts.items()
        )
    if outcome.seed is not None:
        rows["seed"] = str(outcome.seed)
    if outcome.plain_stats is not None:
        rows["without draft"] = (
            f"{outcome.plain_stats.num_target_passes} target passes, "
            f"{outcome.plain_stats.tokens_per_second:.1f} tokens per second"
        )
        rows["same ids as without draft"] = "yes" if outcome.identical else "NO"
    return key_value_table(rows)


def key_value_table(rows: dict[str, Any]) -> Table:
    """Two columns without a frame."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def first_difference(outcome: Outcome) -> str:
    """Where speculative and plain ids part."""
    plain = outcome.plain_tokens or []
    pairs = enumerate(zip(outcome.tokens, plain, strict=False))
    where = next((i for i, (a, b) in pairs if a != b), min(len(plain), len(outcome.tokens)))
    return (
        f"ids differ from plain decoding at token {where}: "
        f"{outcome.tokens[where : where + 3]} instead of {plain[where : where + 3]}"
    )


def _histogram(drafts: list[int]) -> str:
    return ", ".join(f"{accepted}: {count}" for accepted, count in enumerate(drafts)) or "-"


def _median_round(rounds: list[Round]) -> str:
    if not rounds:
        return "-"
    draft, verify, other = (
        f"{median(getattr(one, part) for one in rounds):.2f}"
        for part in ("draft_ms", "verify_ms", "other_ms")
    )
    return f"draft {draft}, verify {verify}, other {other}"


def _percentages(shares: list[float]) -> str:
    return " ".join(f"{100 * share:.0f}%" for share in shares) or "-"
