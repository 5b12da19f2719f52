"""A comparison as a page of the documentation: command, machine, date, seeds, tables, pictures."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from alkn.compare.config import Comparison
from alkn.compare.record import CELLS, page_folder
from alkn.compare.report import table_page
from alkn.compare.results import Results
from alkn.files import write_bytes

PICTURES = {
    "utility": "Utility never drawn on against requests, at equal forgetting where the marker is filled",
    "front": "Forgetting against utility after the last request",
    "cascade": "P of each request after each step: what was asked for, what came back, what went unasked; below a mean"
    " the range over seeds, framed its own step",
}


def write_page(path: Path, folder: Path, comparison: Comparison, results: Results, *, command: str) -> None:
    """Write the page and, beside it in a folder of its name, the pictures.

    Args:
        path: the page, a Markdown file.
        folder: of the comparison; its report must be written.
        comparison: its settings.
        results: what the report shows.
        command: what was typed.
    """
    pictures = page_folder(path)
    lines = []
    attacks = {name: f"What the attack {name} brings back from the last model" for name in comparison.attacks}
    for name, caption in {**PICTURES, **attacks}.items():
        source = folder / "report" / f"{name}.png"
        if source.is_file():
            write_bytes(pictures / source.name, source.read_bytes())
            lines += [f"![{caption}]({pictures.name}/{source.name})", "", f"*{caption}.*", ""]
    title, _, rest = table_page(comparison, results).partition("\n")
    parts = [title, "\n".join(_how(path, results, command)), rest.strip(), "\n".join(lines).strip()]
    write_bytes(path, ("\n\n".join(filter(None, parts)) + "\n").encode())


def _how(page: Path, results: Results, command: str) -> list[str]:
    seeds = sorted({cell.cell.seed for cell in results.cells})
    codes = Counter(f"{cell.made.code} of {cell.made.date}" for cell in results.cells)
    machines = Counter(cell.made.machine for cell in results.cells)
    return [
        f"    {command}",
        "",
        f"- Written {datetime.now(UTC):%Y-%m-%d}; seeds {', '.join(map(str, seeds)) or 'none yet'} (initialisation and"
        " data order of the base model, and every choice of the methods).",
        f"- Code (cells and trials): {_counted(codes)}. Every number of every one: `{page_folder(page).name}/{CELLS}`.",
        f"- Machine: {_counted(machines)}. Seconds are wall time with other cells beside them.",
    ]


def _counted(counts: Counter[str]) -> str:
    """What there is of each, most first."""
    return "; ".join(f"{what} ({count})" for what, count in counts.most_common()) or "none yet"
