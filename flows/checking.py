"""What ``alkn evaluate`` and ``alkn verify`` show of what the library found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Table = tuple[str, tuple[str, ...], list[list[Any]]]
"""Title, columns and rows."""


def matrix_tables(content: dict[str, Any]) -> Iterator[Table]:
    """The matrix for a terminal: what each model knows of each request, and how useful it is."""
    requests, cells = content["requests"], content["cells"]
    if requests:
        rows = [[model, *(_cell(cells[model].get(name)) for name in requests)] for model in content["models"]]
        yield "P / exact memorization of each request under each model", ("model", *requests), rows
    domains = list(dict.fromkeys(name for row in content["utility"].values() for name in row))
    if domains:
        utility = content["utility"]
        rows = [[model, *(_p(utility[model].get(name)) for name in domains)] for model in content["models"]]
        yield "Utility: P on what was never drawn on", ("model", *domains), rows


def _cell(cell: dict[str, Any] | None) -> str | None:
    if cell is None:
        return None
    shown = f"{cell['probability']:.4f} / {cell['exact_memorization']:.3f}"
    return shown if cell["records"] == cell["of"] else f"{shown} ± {cell['error']:.3f}"


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
