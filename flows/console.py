"""What the commands share: the project they stand in, and how they answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from alkn.project import Project

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for a machine.")


def here() -> Project:
    """The project that the command was called in, or after ``-C``."""
    from alkn.project import Project

    return Project.at(Path("."))


def say(text: str, *, err: bool = False) -> None:
    """One line to the user; ``err``: to standard error, where ``--json`` keeps it apart."""
    click.echo(text, err=err)


def number(value: Any, digits: int = 4) -> str:
    """A table's cell: decimals of what is measured, everything else as it is, ``None`` as a dash."""
    return "-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def show_table(title: str, columns: tuple[str, ...], rows: list[list[Any]]) -> None:
    """A table as wide as the terminal, or 140 columns where there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(table)
