"""What all commands print in the same way."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text


def printable(text: str) -> str:
    """Text without characters that steer a terminal: those are shown as escapes.

    They are control characters but newlines and tabs, and marks that turn the direction of
    writing. Names of classes and images may come from a stranger.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character in "\n\t" or not _steers(character) else _escaped(character)
        for character in text
    )


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class _PrintableConsole(Console):
    """A console that shows text as ``printable`` does, whatever prints it."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def console(**options: Any) -> Console:
    """A console for everything that commands print; options: of rich's Console."""
    return _PrintableConsole(**options)


def grid(*rows: tuple[str, str]) -> Table:
    """Lines of a name and what is to be said of it; square brackets are no markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table
