"""Plain lines, tables and JSON files: everything that a command prints goes through here."""

import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 160  # of tables where there is no terminal
LONGEST = 2000  # characters of a sentence on why a command ends
LABEL = 10  # columns of the label of a line such as "model      pocket"
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# No markup, emoji or highlighting: file names and captions are printed as they are.
_PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "emoji": False, "highlight": False}
out = Console(width=None if sys.stdout.isatty() else WIDTH, **_PLAIN)
err = Console(stderr=True, **_PLAIN)


def printable(text: str) -> str:
    """The text on one line, with control characters as escapes such as \\x1b: a caption or a file
    name cannot move the cursor or forge a line."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def say(text: str) -> None:
    """A line of a command's result, on standard output."""
    out.print(printable(text))


def field(label: str, value: object, width: int = LABEL) -> None:
    """A line of a result with its label in a column."""
    say(f"{label:<{width}} {value}")


def note(text: str) -> None:
    """A line about what is going on, on standard error."""
    err.print(printable(text))


def refuse(text: str) -> None:
    """Why a command ends, on standard error."""
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    err.print(f"dopsd: {printable(shown)}", style="red")


def replace_unencodable() -> None:
    """Print ? for a character that the terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output."""
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(printable, row))
    out.print(table)


def write_numbers(path: Path | None, numbers: Any) -> None:
    """The same as JSON, where asked for."""
    if path:
        from dopsd.files import write_json

        write_json(path, numbers)
        field("numbers", path)
