"""Texts of the data on a terminal, as they are.

Labels and paths are anybody's: `:bomb:` is no emoji there, `[red]` no colour, and no escape sequence moves
the cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 160  # of tables that go into a file


def console(stderr: bool = False) -> Console:
    """A console that takes no text for a command."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else _WIDTH
    return Console(stderr=stderr, width=width, soft_wrap=True, highlight=False, emoji=False, markup=False)


def one_line(text: str) -> str:
    """The text with spaces in place of what is no printable sign."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(one_line(line) for line in text.split("\n"))


def plain(value: Any) -> str:
    """A cell: a count with its thousands, anything else as it says itself."""
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def table_of(rows: list[dict[str, Any]], cell: Callable[[Any], str] = plain) -> Table:
    """Rows below each other under the names of the first one; numbers to the right."""
    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items() if rows else ():
        table.add_column(
            name.replace("_", " "), justify="right" if isinstance(value, int) else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(cell, row.values()))
    return table
