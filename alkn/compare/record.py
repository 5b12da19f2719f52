"""The record beside a page: every number of every cell, from which a comparison goes on elsewhere.

A page lies in a repository, the folder of its comparison on one machine; what a cell came to is kept beside the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alkn.compare.config import Cell, Comparison
from alkn.compare.made import Made
from alkn.compare.results import CellResult, Level, Record, Results, StepResult, is_complete
from alkn.errors import InputError
from alkn.files import read_json, write_json

CELLS = "cells.json"
"""Every number of every cell, in ``report/`` of a comparison's folder and beside a page."""


def page_folder(page: Path) -> Path:
    """Where the pictures and the record of a page lie: ``docs/results`` of ``docs/RESULTS.md``."""
    return page.with_name(page.stem.lower())


def record_file(page: Path) -> Path:
    """The record of a page."""
    return page_folder(page) / CELLS


def read_record(path: Path | None) -> Record:
    """The cells on record in a ``cells.json``; without one, none.

    Raises:
        InputError: if the file is none of ours.
    """
    if path is None or not path.is_file():
        return {}
    try:
        cells = [_from_row(row) for row in read_json(path)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path}: not the record of a comparison ({type(error).__name__}); remove it, and all is made again"
        ) from None
    return {result.cell.name: result for result in cells}


def write_record(path: Path, comparison: Comparison, results: Results, record: Record) -> None:
    """Write a record with what is complete by now; of other cells of the comparison's methods, what was on it stays."""
    labels = {entry.label for entry in comparison.methods}
    kept = {name: result for name, result in record.items() if result.cell.label in labels}
    new = {result.cell.name: result for result in results.cells if is_complete(result, comparison)}
    write_json(path, [cell_row(result) for _, result in sorted((kept | new).items())])


def cell_row(cell: CellResult) -> dict[str, Any]:
    """Everything that is known of a cell, as plain values."""
    row = asdict(cell)
    return {**row, "reached": [cell.reached(step) for step in cell.steps], "quantities": cell.quantities()}


def _from_row(row: Mapping[str, Any]) -> CellResult:
    """The inverse of :func:`cell_row`."""
    return CellResult(
        cell=Cell(**row["cell"]),
        limits=Level(**row["limits"]),
        base=_step_from(row["base"]),
        steps=[_step_from(step) for step in row["steps"]],
        made=Made(**row["made"]),
        **{name: row[name] for name in ("state", "reason", "chain", "asked", "splits", "final")},
    )


def _step_from(row: Mapping[str, Any]) -> StepResult:
    return StepResult(**{**row, "requests": {name: Level(**level) for name, level in row["requests"].items()}})
