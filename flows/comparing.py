"""What ``alkn compare`` does around its flow: Prefect's home, the report of what there is, the page."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alkn.compare.config import load_comparison
from alkn.compare.page import write_page
from alkn.compare.record import read_record, record_file, write_record
from alkn.compare.report import table_rows, write_report
from alkn.compare.results import Results, collect
from flows.server import prefect_api


@dataclass(frozen=True)
class Outcome:
    """What the command prints.

    Attributes:
        rows: of table.csv.
        failed: cell -> why it could not be made.
        missing: cells that are still to be made.
        columns, cells: a table that fits a screen.
    """

    rows: list[dict[str, Any]]
    failed: dict[str, str]
    missing: list[str]
    columns: tuple[str, ...]
    cells: list[list[Any]]


def run_comparison(
    config: Path,
    folder: Path,
    *,
    workers: int | None,
    only: Sequence[str],
    report_only: bool,
    page: Path | None,
) -> Outcome:
    """Run the flow, or only write the report of what there is.

    Raises:
        InputError: if the settings are wrong, or another process works in the folder.
    """
    comparison = load_comparison(config)
    comparison.only(only)
    failed: dict[str, str] = {}
    path = None if page is None else record_file(page)
    record = read_record(path)
    if report_only:
        write_report(folder, comparison, collect(folder, comparison, record))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # A Prefect home of the comparison's own, before Prefect is imported and reads its settings.
        os.environ.setdefault("PREFECT_HOME", str(folder.resolve() / ".prefect"))
        with prefect_api(Path(".")):
            from flows.compare import compare

            failed = compare(
                config=str(config), folder=str(folder), workers=workers, only=list(only),
                record=None if path is None else str(path.resolve()),
            )["failed"]  # fmt: skip
        record = read_record(path)
    results = collect(folder, comparison, record)
    if page is not None:
        write_record(record_file(page), comparison, results, record)
        command = f"alkn compare {shlex.quote(str(config))} --folder {shlex.quote(str(folder))}"
        write_page(page, folder, comparison, results, command=command)
    columns, cells = _screen(results)
    return Outcome(table_rows(results), failed, [cell.title for cell in results.missing], columns, cells)


def _screen(results: Results) -> tuple[tuple[str, ...], list[list[Any]]]:
    domains = list(results.cells[0].base.never) if results.cells else []
    names = ["p", "em", *(f"never/{domain}" for domain in domains), "passes"]
    headings = ("P", "exact mem.", *(f"{domain}, never drawn on" for domain in domains), "passes")
    rows: list[list[Any]] = []
    for row in results.rows:
        spreads = row.spreads()
        reached = f"{sum(c.reached_count for c in row.cells)}/{sum(len(c.chain) for c in row.cells)}"
        numbers = [spreads.get(name) for name in names]
        shown = [None if s is None else f"{s.mean:,.0f}" if s.mean > 10 else f"{s.mean:.4f}" for s in numbers]
        rows.append([row.title, len(row.cells), reached, *shown])
    return ("method", "seeds", "reached", *headings), rows
