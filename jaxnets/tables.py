"""Tables of text, on a terminal and as Markdown."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table


class Section(NamedTuple):
    """A table to print: cells of text, left-aligned in the first columns, with right-aligned numbers after them."""

    title: str  # or ""
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int
    footer: str = ""


def print_section(section: Section) -> None:
    """Print a table no wider than the terminal, or 80 columns without one; long names are folded, never cut."""
    console = Console(file=sys.stdout, highlight=False, markup=False)
    if section.title:
        console.print(section.title, style="bold")
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for position, name in enumerate(section.header):
        if position < section.text_columns:
            table.add_column(name, overflow="fold")
        else:  # the unit on a line below, since numbers need less room
            table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in section.rows:
        table.add_row(*row)
    console.print(table)
    if section.footer:
        console.print("\n" + section.footer)


def markdown(section: Section) -> str:
    """The table for a README."""
    alignment = ["---" if i < section.text_columns else "---:" for i in range(len(section.header))]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (section.header, *section.rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], alignment, *rows[1:])]
    parts = [f"**{section.title}**"] if section.title else []
    parts.append("\n".join(lines))
    if section.footer:
        parts.append(section.footer)
    return "\n\n".join(parts)
