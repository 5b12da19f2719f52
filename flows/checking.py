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


def verify_tables(report: dict[str, Any]) -> Iterator[Table]:
    """A verification for a terminal: what does not hold, then the gates on the fresh numbers."""
    if report["findings"]:
        rows = [
            [one["kind"], one["where"], one["what"], _short(one["expected"]), _short(one["found"])]
            for one in report["findings"]
        ]
        yield "What does not hold", ("", "step", "what", "recorded, or limit", "found"), rows
    checks = [
        [gate, check["what"], _short(check["value"]), _short(check["limit"]), "passed" if check["passed"] else "failed"]
        for gate, verdict in report["gates"].items()
        for check in verdict["checks"]
    ]
    if checks:
        yield "Gates, on numbers measured now", ("gate", "check", "value", "limit", ""), checks


def _short(value: Any) -> str | None:
    if isinstance(value, float):
        return f"{value:.4g}"
    return None if value is None else str(value)[:28]


def _cell(cell: dict[str, Any] | None) -> str | None:
    if cell is None:
        return None
    shown = f"{cell['probability']:.4f} / {cell['exact_memorization']:.3f}"
    return shown if cell["records"] == cell["of"] else f"{shown} ± {cell['error']:.3f}"


def _p(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"
