"""What `patch` did, as a value that prints as a table."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import StringIO


@dataclass(frozen=True)
class Row:
    """One module: its path, what took its place (None: kept), why, and how often it fell back to the original since.

    quantised: the formats of the weights in it; weights: their bytes before and after.
    """

    module: str
    kind: str
    swapped_to: str | None
    reason: str = ""
    fallbacks: tuple[tuple[str, int], ...] = ()
    quantised: str = ""
    weights: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Report:
    """Rows in module order. `print(report)` shows a table: module, swapped to, or kept and why.

    kv_cache: the dtype of keys and values while generating, if it is not the model's own.
    """

    model: str
    family: str | None
    rows: tuple[Row, ...]
    kv_cache: str | None = None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def swapped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.swapped_to is not None)

    @property
    def fallbacks(self) -> int:
        """Calls that the original layers served, over all modules."""
        return sum(count for row in self.rows for _, count in row.fallbacks)

    @property
    def weights(self) -> tuple[int, int]:
        """Bytes of all quantised weights, before and after."""
        return sum(row.weights[0] for row in self.rows), sum(row.weights[1] for row in self.rows)

    def __str__(self) -> str:
        from rich.console import Console
        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> object:
        from rich.console import Group
        from rich.table import Table
        leaves = any(not row.quantised for row in self.swapped)
        what = "no description, leaves swapped" if leaves else "linears quantised" if self.swapped else "nothing swapped"
        title = f"{self.model}: {self.family or what}"
        if not self.rows:
            return title
        quantised = any(row.quantised for row in self.rows)
        if quantised:
            title += f"; quantised weights take {_mib(self.weights)} MiB"
        if self.kv_cache:
            title += f"; keys and values in {self.kv_cache} while generating"
        table = Table()
        reasons, fallbacks = any(row.reason for row in self.rows), self.fallbacks > 0
        for column in ("module", "class", "swapped to", *["why"] * reasons, *["fell back"] * fallbacks, *["weights", "MiB"] * quantised):
            table.add_column(column, overflow="fold")
        for row, names in _runs(self.rows):
            fallen = ", ".join(f"{reason}: {count}" for reason, count in row.fallbacks)
            table.add_row(names, row.kind, row.swapped_to or "kept", *[row.reason] * reasons, *[fallen] * fallbacks,
                          *[row.quantised, _mib(row.weights) if row.quantised else ""] * quantised)
        return Group(title, table)


def _runs(rows: tuple[Row, ...]) -> Iterator[tuple[Row, str]]:
    """Neighbouring rows that differ only in their name are shown as one, `first .. last (count)`."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and _same(rows[start], rows[end]):
            continue
        count = end - start
        yield rows[start], rows[start].module if count == 1 else f"{rows[start].module} .. {rows[end - 1].module} ({count})"
        start = end


def _same(a: Row, b: Row) -> bool:
    return replace(a, module="") == replace(b, module="")


def _mib(weights: tuple[int, int]) -> str:
    return " -> ".join(f"{size / 2**20:.1f}" for size in weights)
