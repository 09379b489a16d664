"""Tables on a console: framed on a terminal, plain columns elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import ROUNDED
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

__all__ = ["print_table"]


def print_table(
    console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print rows under a header, each column as wide as its widest cell."""
    listed = [tuple(header), *map(tuple, rows)]
    console.print()
    if not console.is_terminal:
        console.out(title, highlight=False)
        widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
        for row in listed:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            console.out("  " + "  ".join(cells).rstrip(), highlight=False)
        return
    table = Table(title=title, title_justify="left", box=ROUNDED)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in listed[1:]:
        table.add_row(*row)
    console.print(table, markup=False)
