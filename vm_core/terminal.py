"""What all commands print in the same way."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text


def grid(*rows: tuple[str, str]) -> Table:
    """Lines of a name and what is to be said of it; square brackets are no markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
