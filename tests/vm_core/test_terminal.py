import io
import logging

import pytest
from rich.table import Table
from rich.text import Text

from vm_core.logs import TextFormatter
from vm_core.results import _csv
from vm_core.terminal import console, grid, printable

HOSTILE = "\x1b]0;title\x07\x1b[2Jcat\r\x9b31m\u202etxt\x00\x7f\ud800"


def test_what_steers_a_terminal_is_shown():
    shown = printable(HOSTILE)
    assert shown == r"\x1b]0;title\x07\x1b[2Jcat\r\x9b31m\u202etxt\x00\x7f\ud800"
    for text in ("Käse 写真 🌸", "two\nlines\tand tabs", ""):
        assert printable(text) == text


@pytest.mark.parametrize("make", [str, Text, lambda text: grid((text, text))])
def test_nothing_that_commands_print_steers_the_terminal(make):
    file = io.StringIO()
    lines = console(file=file, width=300, force_terminal=True)
    lines.print(make(HOSTILE), markup=False)
    table = Table(title=Text(HOSTILE))
    table.add_column(Text(HOSTILE))
    table.add_row(Text(HOSTILE))
    lines.print(table)
    written = file.getvalue()
    assert r"\x1b]0;title" in written and r"\x1b[2Jcat" in written
    for sequence in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e", "\x00", "\x7f", "cat\r"):
        assert sequence not in written


def test_logs_are_printable():
    record = logging.LogRecord("a", logging.WARNING, "f", 1, "class %s", (HOSTILE,), None)
    assert TextFormatter().format(record).isprintable()


def test_cells_are_no_formulas():
    text = _csv([("=1+1", "+a", "-a", "@a", "\ta", "a=1", "", -1.5, -1)])
    assert text == "'=1+1,'+a,'-a,'@a,'\ta,a=1,,-1.5,-1\n"
