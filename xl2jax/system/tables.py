"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def print_table(rows: Sequence[Mapping[str, Any]], *, decimals: int) -> None:
    """Prints rows as right-aligned columns under their names. A value that is None or missing is printed as -."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, *([_cell(row.get(name), decimals) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any, decimals: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)
