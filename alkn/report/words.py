"""Numbers and names as people read them, the same on paper and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "probability": "P, mean",
    "probability_p95": "P, 95th percentile",
    "probability_worst": "P, best-known record",
    "exact_memorization": "exact memorization",
    "extraction_strength": "extraction strength",
    "rouge_l": "ROUGE-L recall",
    "truth_ratio": "truth ratio",
    "model_utility": "model utility",
    "contained": "answer contained",
    "seconds": "seconds",
}
"""Metric -> its name; others are called by their own with blanks for underscores."""


def name_of(metric: str) -> str:
    """A metric's name in words."""
    return NAMES.get(metric, metric.replace("_", " ").replace(" auc", " AUC"))


def about(curve: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers that an attack moves, first the one to look at, each with its name over a column."""
    moved = curve.get("about") or ("probability", "exact_memorization")  # curves of older versions do not say
    return [(metric, "P" if metric == "probability" else name_of(metric)) for metric in moved]


def number(value: float | None) -> str:
    """A measured number with so many digits that small ones can still be told apart; a dash for none."""
    if value is None:
        return "–"
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"


def plain(value: Any) -> str:
    """A setting as one would write it."""
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


def interval(bounds: Sequence[float] | None) -> str:
    """Two bounds, or a dash."""
    return "–" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def settings(values: Mapping[str, Any]) -> str:
    """A flat mapping in one line."""
    return ", ".join(f"{name} {plain(value)}" for name, value in values.items()) or "–"


def short(digest: str, length: int = 12) -> str:
    """The beginning of a digest, with its kind."""
    kind, _, hexes = digest.rpartition(":")
    return f"{kind}:{hexes[:length]}…" if kind and len(hexes) > length else digest


def timely(request: Mapping[str, Any]) -> str:
    """The day of the decision beside the day it was due."""
    if request["due"] is None:
        return "no due date was set"
    return f"after the due date, {request['due']}" if request["late"] else f"in time, due {request['due']}"
