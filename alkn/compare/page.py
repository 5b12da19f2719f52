"""A comparison as a page of the documentation: command, machine, date, seeds, tables, pictures."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from alkn.compare.config import Comparison
from alkn.compare.report import table_page
from alkn.compare.results import Results
from alkn.files import write_bytes
from alkn.manifest import code_version, environment

PICTURES = {
    "utility": "Utility never drawn on against requests, at equal forgetting where the marker is filled",
    "front": "Forgetting against utility after the last request",
    "cascade": "P of each request after each step: what was asked for, what came back, what went unasked",
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
    pictures = path.with_name(path.stem.lower())
    lines = []
    attacks = {name: f"What the attack {name} brings back from the last model" for name in comparison.attacks}
    for name, caption in {**PICTURES, **attacks}.items():
        source = folder / "report" / f"{name}.png"
        if source.is_file():
            write_bytes(pictures / source.name, source.read_bytes())
            lines += [f"![{caption}]({pictures.name}/{source.name})", "", f"*{caption}.*", ""]
    title, _, rest = table_page(comparison, results).partition("\n")
    parts = [title, "\n".join(_how(comparison, results, command)), rest.strip(), "\n".join(lines).strip()]
    write_bytes(path, ("\n\n".join(filter(None, parts)) + "\n").encode())


def _how(comparison: Comparison, results: Results, command: str) -> list[str]:
    seeds = sorted({cell.cell.seed for cell in results.cells})
    versions = environment()
    return [
        f"    {command}",
        "",
        f"- Written {datetime.now(UTC):%Y-%m-%d}; seeds {', '.join(map(str, seeds)) or 'none yet'} (initialisation and"
        " data order of the base model, and every choice of the methods); code"
        f" {code_version().get('commit', code_version()['version'])[:12]}.",
        f"- Machine: {_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB; torch {versions['torch']},"
        f" transformers {versions['transformers']}, Python {versions['python']}."
        " Seconds are wall time with other cells beside them.",
    ]


def _processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
