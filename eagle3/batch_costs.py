"""What a round costs by the number of sequences that run: one table of `width` for each.

A pass over eight sequences of five rows is not one over forty rows of one: eight caches are read,
and the rows of eight texts ask for more experts than those of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aerie.eagle3.width import RoundCosts


@dataclass(frozen=True)
class BatchCosts:
    """Tables by number of sequences; the rows of each table are those of *every* sequence."""

    tables: Mapping[int, RoundCosts]

    def __post_init__(self) -> None:
        wrong = [n for n in self.tables if type(n) is not int or n < 1]
        if wrong or 1 not in self.tables:
            raise ValueError(
                "cost_aware_width: by_sequences: needs tables of 1 sequence and of larger numbers, "
                f"got {list(self.tables)}"
            )

    def for_rounds(self, num_sequences: int, num_rows: int) -> RoundCosts | None:
        """In rows of all sequences together, as `RoundCosts`: the table of the next larger number,
        which is what a round filled up to a size class costs. None: the tables do not reach."""
        size = min((n for n in self.tables if n >= num_sequences), default=None)
        if size is None:
            return None
        table = self.tables[size]
        verify_ms = {num_sequences * rows: ms for rows, ms in table.verify_ms.items()}
        own = RoundCosts(verify_ms, table.draft_level_ms, num_sequences)
        return own.for_rounds(num_sequences, num_rows)


def costs_from_dict(values: Mapping[str, Any]) -> RoundCosts | BatchCosts:
    """From JSON: one table, or {"by_sequences": {"1": table, "8": table}}. Raises ValueError."""
    tables = values.get("by_sequences")
    if tables is None:
        return RoundCosts.from_dict(values)
    is_table = isinstance(tables, Mapping) and all(isinstance(t, Mapping) for t in tables.values())
    if len(values) != 1 or not is_table:
        raise ValueError(
            'cost_aware_width: by_sequences: must be {"1": {"verify_ms": ...}, SEQUENCES: ...} and '
            f"stand alone, got {dict(values)!r}"
        )
    return BatchCosts(
        {int(n) if n.isdecimal() else n: RoundCosts.from_dict(t) for n, t in tables.items()}
    )
