"""A curve is shown by the numbers that its attack moves."""

from __future__ import annotations

from typing import Any

from alkn.report import words
from alkn.report.plots import attack_figure


def curve(**more: Any) -> dict[str, Any]:
    rows = [(1, 0.1), (4, 0.2), (16, 0.6)]
    points = [
        {"at": n, "probability": 0.01, "exact_memorization": 0.02, "rouge_l": best, "contained": 0.0, "requests": {}}
        for n, best in rows
    ]
    return {"unit": "samples", "points": points, "budget": {}, "missing": {}, **more}


def test_what_a_curve_is_about() -> None:
    assert words.about(curve()) == [("probability", "P"), ("exact_memorization", "exact memorization")]
    assert words.about(curve(about=["rouge_l", "contained"])) == [
        ("rouge_l", "ROUGE-L recall"),
        ("contained", "answer contained"),
    ]


def test_the_picture_shows_it() -> None:
    for given, heights, label in (
        (curve(about=["rouge_l", "contained"]), [0.1, 0.2, 0.6], "ROUGE-L recall of the forgotten records"),
        (curve(), [0.01, 0.01, 0.01], "P of the forgotten records"),
    ):
        (axis,) = attack_figure({"r001": given}).axes
        assert list(axis.lines[0].get_ydata()) == heights and axis.get_ylabel() == label
