"""Statistics over seeds, the choice of a sweep and the table, against numpy and cases worked out by hand."""

from __future__ import annotations

import csv
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alkn.compare import plots
from alkn.compare.config import Cell, Comparison, Entry
from alkn.compare.made import Made
from alkn.compare.record import read_record, write_record
from alkn.compare.report import table_page, table_rows, write_report
from alkn.compare.results import (
    CellResult,
    Level,
    Results,
    Row,
    Spread,
    StepResult,
    Trial,
    choose,
)
from alkn.errors import InputError
from alkn.report.drawing import look_of, style

CHAIN = ("r1", "r2", "r3")
LIMITS = Level(0.01, 0.13)
WHENCE = ("sha256:asked", "sha256:splits", Made("c0ffee", "2026-11-26", "a machine"))


def made_up(
    label: str, seed: int, *, p: float | None = None, variant: str = "", never: float | None = None, steps: int = 3
) -> CellResult:
    """A chain of three requests with random levels, or with one P and one utility throughout."""
    draw = random.Random(f"{label}{variant}{seed}")
    base = StepResult(
        "", {r: Level(0.99, 1.0) for r in CHAIN}, {"people": 0.97, "facts": 0.98}, {"people": 0.96, "facts": 0.95}
    )
    made = [
        StepResult(
            request,
            {r: Level(p if p is not None else draw.random(), draw.random() if p is None else 0.1) for r in CHAIN},
            {"people": draw.random(), "facts": draw.random()},
            {"people": draw.random() if never is None else never, "facts": draw.random()},
            passes=draw.randrange(1000),
            seconds=draw.random() * 100,
        )
        for request in CHAIN[:steps]
    ]  # fmt: skip
    state = "done" if steps == len(CHAIN) else "diverged"
    return CellResult(
        Cell(label, variant, seed), state, "" if state == "done" else "r3: loss", LIMITS, CHAIN, base, made, *WHENCE
    )


def test_spread_is_numpys() -> None:
    draw = random.Random(3)
    for n in (2, 3, 7):
        values = [draw.uniform(-5, 5) for _ in range(n)]
        found = Spread.of([None, *values])
        assert found is not None and found.n == n
        assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
        assert found.std == pytest.approx(np.std(values, ddof=1), abs=1e-12)
        assert (found.low, found.high) == (np.min(values), np.max(values))


def test_spread_of_one_of_none_and_of_equal_numbers() -> None:
    assert Spread.of([0.25]) == Spread(1, 0.25, None, 0.25, 0.25)
    assert Spread.of([None]) is None
    equal = Spread.of([0.1, 0.1, 0.1])
    assert equal is not None and equal.low <= equal.mean <= equal.high, "a mean beside its range has no error bar"


def test_quantities_are_the_worst_the_last_and_the_sum() -> None:
    cell = made_up("a", 0)
    numbers = cell.quantities()
    own = np.array([step.requests[step.request].p for step in cell.steps])
    end = np.array([level.p for level in cell.steps[-1].requests.values()])
    assert numbers["p"] == own.max() and numbers["p_end"] == end.max()
    assert numbers["em"] == max(s.requests[s.request].exact_memorization for s in cell.steps)
    assert numbers["never/facts"] == cell.steps[2].never["facts"]
    assert numbers["drawn/people"] == cell.steps[2].drawn["people"]
    assert numbers["passes"] == np.sum([step.passes for step in cell.steps])
    assert numbers["seconds"] == pytest.approx(np.sum([step.seconds for step in cell.steps]))


def test_a_number_that_could_not_be_computed_is_not_left_out_of_the_worst() -> None:
    cell = made_up("a", 0)
    broken = StepResult("r3", {**cell.steps[2].requests, "r3": Level(None, 0.1)}, {}, {}, 1, None)
    numbers = CellResult(
        cell.cell, "done", "", LIMITS, CHAIN, cell.base, [*cell.steps[:2], broken], *WHENCE
    ).quantities()
    assert numbers["p"] is None and numbers["em"] is not None
    assert numbers["seconds"] is None, "seconds that an interrupted run lost are not zero"


@pytest.mark.parametrize(
    ("p", "em", "reached"), [(0.01, 0.13, True), (0.0101, 0.1, False), (0.001, 0.131, False), (None, 0.1, False)]
)
def test_a_target_is_reached_by_both_numbers(p: float | None, em: float, reached: bool) -> None:
    step = StepResult("r1", {"r1": Level(p, em)}, {}, {})
    cell = CellResult(Cell("a", "", 0), "done", "", LIMITS, ("r1",), step, [step], *WHENCE)
    assert cell.reached(step) is reached


def test_excess_with_a_target_of_zero() -> None:
    assert Level(0.0, 0.1).excess(Level(0.0, 0.1)) == 1
    assert Level(0.001, 0.1).excess(Level(0.0, 0.1)) == float("inf")


def test_a_sweep_takes_utility_among_those_that_forgot() -> None:
    loud = made_up("a", 0, variant="lr=1", p=0.5, never=0.9)
    poor = made_up("a", 0, variant="lr=2", p=0.005, never=0.2)
    good = made_up("a", 0, variant="lr=3", p=0.005, never=0.4)
    gone = made_up("a", 0, variant="lr=4", p=0.005, never=0.9, steps=2)
    assert choose([loud, poor, good, gone], "people") is good
    assert choose([loud, gone], "people") is loud, "a chain that broke off is the last choice"
    near = made_up("a", 0, variant="lr=5", p=0.02, never=0.1)
    assert choose([loud, near], None) is near, "where none forgot, the nearest to the targets"


def results(*rows: tuple[str, list[CellResult]], trials: list[Trial] | None = None) -> Results:
    made = [Row(Entry(label=label, method="x"), "", cells, []) for label, cells in rows]
    return Results(made, trials or [], "people")


COMPARISON = Comparison(
    settings={"benchmark": "people"}, methods=({"label": "a", "method": "task_vector"},), notes=("nothing was tuned",)
)


def test_the_table_holds_numpys_numbers(tmp_path: Path) -> None:
    cells = {label: [made_up(label, seed) for seed in range(3)] for label in ("a", "b")}
    write_report(tmp_path, COMPARISON, results(*cells.items()), pictures=False)
    with open(tmp_path / "report" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["a", "b"]
    for row in rows:
        for name in ("p", "em", "p_end", "never/people", "drawn/facts", "passes", "seconds"):
            values = np.array([cell.quantities()[name] for cell in cells[row["method"]]], dtype=float)
            assert float(row[f"{name} mean"]) == pytest.approx(values.mean(), rel=1e-12)
            assert float(row[f"{name} std"]) == pytest.approx(values.std(ddof=1), rel=1e-9)
            assert [float(row[f"{name} min"]), float(row[f"{name} max"])] == [values.min(), values.max()]
    page = (tmp_path / "report" / "table.md").read_text()
    people = np.array([cell.quantities()["never/people"] for cell in cells["a"]], dtype=float)
    shown = f"{people.mean():.3f} ± {people.std(ddof=1):.3f}<br>{people.min():.3f}–{people.max():.3f}"
    line = next(line for line in page.splitlines() if line.startswith("| a |"))
    assert f" {shown} " in line and "nothing was tuned" in page


def test_what_fell_short_is_said() -> None:
    far = made_up("far", 0, p=0.5)
    broken = made_up("broken", 1, p=0.001, steps=2)
    page = table_page(COMPARISON, results(("far", [far]), ("broken", [broken])))
    assert "| far | 0 | r2 | target not reached | 0.5 | 0.1 |" in page
    assert "| broken | 1 | r3 | diverged; the chain ends |  |  |" in page
    flat = {row["method"]: row for row in table_rows(results(("far", [far]), ("broken", [broken])))}
    assert (flat["far"]["targets reached"], flat["far"]["requests"]) == (0, 3)
    assert (flat["broken"]["targets reached"], flat["broken"]["diverged"]) == (2, 1)
    assert flat["broken"]["p mean"] is None, "a chain that broke off has no last model"


def test_a_mean_over_fewer_seeds_says_so_and_what_was_not_measured_is_named() -> None:
    """Relearning diverged on one seed of three, and one request of it has no forget quality."""
    asked = {"inputs": {"attacks": {"relearning": {}}}}
    values = dict(zip(CHAIN, (0.9, 0.1, 0.2), strict=True))
    quality = {request: {"p_value": value, "honest": {}} for request, value in values.items()}
    curve = {"about": {"probability": {}}, "unit": "steps", "points": [{"at": 0, "probability": 0.25}]}
    whole = {**asked, "relearning": curve, "forget_quality": quality, "missing": {}}
    lost = {"relearning": "step 3: the loss is nan", "forget_quality.r2": "no record has wrong answers"}
    part = {**asked, "forget_quality": {r: quality[r] for r in ("r1", "r3")}, "missing": lost}
    cells = [replace(made_up("a", seed), final=part if seed == 1 else whole) for seed in range(3)]
    page = table_page(COMPARISON, results(("a", cells)))
    line = next(line for line in page.splitlines() if line.startswith("| a | 0, 1, 2 |"))
    assert line.count("<br>2 of 3 seeds") == 3, "P after relearning, smallest and median p-value"
    assert "| a | 1 | relearning | step 3: the loss is nan |" in page
    assert "| a | 1 | forget_quality.r2 | no record has wrong answers |" in page
    numbers = cells[0].quantities()
    assert (numbers["quality_min"], numbers["quality_median"], numbers["quality_honest"]) == (0.1, 0.2, None)
    (flat,) = table_rows(results(("a", cells)))
    assert (flat["attack/relearning n"], flat["quality_min n"], flat["p n"]) == (2, 2, 3)
    assert "Not measured" not in table_page(COMPARISON, results(("a", [cells[0]])))


def test_cells_that_are_missing_are_counted() -> None:
    row = Row(Entry(label="a", method="x"), "", [made_up("a", 0)], [Cell("a", "", 1)])
    page = table_page(COMPARISON, Results([row], [], "people"))
    assert "1 cells are still to be made" in page and "| a | 0; 1 not made yet |" in page


@pytest.mark.parametrize(
    ("sweep", "variant", "edge"),
    [
        ({"lr": (3e-5, 1e-4, 3e-4)}, "lr=3e-05", "lowest"),
        ({"lr": (3e-4, 3e-5, 1e-4)}, "lr=0.0003", "highest"),
        ({"lr": (3e-5, 1e-4, 3e-4)}, "lr=0.0001", ""),
        ({"lr": (1e-4,)}, "lr=0.0001", ""),
        ({"lr": (1e-4, 3e-4), "steps": (10,)}, "lr=0.0003,steps=10", "highest"),
        ({"loss": ("npo", "gradient_difference")}, "loss=npo", ""),
        ({"lr": (1e-4, 3e-4), "steps": (10, 20)}, "lr=0.0001,steps=10", ""),
        ({}, "", ""),
    ],
)
def test_a_sweep_that_ends_at_what_it_chose_says_so(sweep: dict[str, Any], variant: str, edge: str) -> None:
    """Of one number only: of two, or of words, there is no end."""
    entry = Entry(label="a", method="x", sweep=sweep)
    assert variant in entry.variants() and entry.edge(variant) == edge
    made = made_up("a", 0, variant=variant)
    page = table_page(COMPARISON, Results([Row(entry, variant, [made], [])], [Trial("a", made, True)], "people"))
    (line,) = [line for line in page.splitlines() if line.startswith(f"| a | {variant} |")]
    assert line.endswith(f"| yes, {edge} |" if edge else "| yes |")


def test_the_sweep_is_shown_with_what_was_chosen() -> None:
    trials = [
        Trial("a", made_up("a", 0, variant="lr=1", p=0.001, never=0.25), True),
        Trial("a", made_up("a", 0, variant="lr=2", p=0.5, never=0.5), False),
    ]
    lines = table_page(COMPARISON, results(("a", [trials[0].result]), trials=trials)).splitlines()
    assert any(
        line.startswith("| a | lr=1 | 3/3 | 0.0010 | 0.100 | 0.250 |") and line.endswith("| yes |") for line in lines
    )
    assert any(line.startswith("| a | lr=2 | 0/3 | 0.5000 |") and line.endswith("|  |") for line in lines)


def test_the_curve_and_the_cascade_are_means_over_seeds() -> None:
    cells = [made_up("a", seed) for seed in range(3)]
    row = Row(Entry(label="a", method="x"), "", cells, [])
    curve = list(plots.utility_curve(row, "facts"))
    assert [len(curve), curve[0][0].mean, curve[0][1]] == [4, 0.95, True]
    for number in range(3):
        values = [cell.steps[number].never["facts"] for cell in cells]
        assert curve[number + 1][0].mean == pytest.approx(np.mean(values))
        assert (curve[number + 1][0].low, curve[number + 1][0].high) == (min(values), max(values))
    matrix = plots.cascade(cells)
    assert [line[0] and line[0].mean for line in matrix] == [0.99] * 3
    assert {len(line) for line in matrix} == {4}
    values, found = [cell.steps[2].requests["r2"].p for cell in cells], matrix[1][3]
    assert found is not None and found.mean == pytest.approx(np.mean(values))
    assert (found.low, found.high) == (min(values), max(values)) and found.low < found.high


def test_the_cascade_tells_the_range_where_seeds_differ() -> None:
    """A line below the mean where two decimals tell them apart, none for one seed."""
    for seeds, ranges in ((3, True), (1, False)):
        cells = [made_up("a", seed) for seed in range(seeds)]
        figure = plots.cascade_figure([Row(Entry(label="a", method="x"), "", cells, [])])
        written = [text.get_text() for text in figure.axes[0].texts]
        assert len([text for text in written if "–" not in text]) == 3 * 4
        assert any("–" in text for text in written) is ranges


def test_the_pictures_are_pictures(tmp_path: Path) -> None:
    """Also with a P of zero, which has no place on a logarithmic axis, with a broken chain, and byte for byte."""
    cells = [made_up("a", seed, p=0.0) for seed in range(2)]
    these = results(("a", cells), ("b", [made_up("b", 0)]), ("c", [made_up("c", 0, steps=2)]))
    first = {path.name: path.read_bytes() for path in plots.write_plots(tmp_path / "1", these)}
    assert {name.rsplit(".")[0] for name in first} == {"utility", "front", "cascade"}
    for name, data in first.items():
        assert data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data[:500]
    again = {path.name: path.read_bytes() for path in plots.write_plots(tmp_path / "2", these)}
    assert again == first
    assert plots.write_plots(tmp_path / "3", results(("c", [made_up("c", 0, steps=2)]))) == []


@pytest.mark.parametrize("methods", [3, 28])
def test_all_methods_stand_in_the_legend(methods: int) -> None:
    """Of a picture of many methods no line of it lies outside, nor over a panel."""
    rows = results(*((f"one_of_the_methods_{n}", [made_up(f"one_of_the_methods_{n}", 0)]) for n in range(methods))).rows
    looks = {row.entry.label: look_of(n) for n, row in enumerate(rows)}
    with style():
        for figure in (plots.utility_figure(rows, looks), plots.front_figure(rows, looks, "facts")):
            figure.draw_without_rendering()
            (legend,), whole = figure.legends, figure.bbox
            box = legend.get_window_extent()
            assert len(legend.get_texts()) == methods
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1 and box.x1 <= whole.x1
            assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)


def comparison_of(*labels: str) -> Comparison:
    return Comparison.model_validate(
        {
            "settings": {"benchmark": "people"}, "seeds": [0, 1],
            "methods": [{"label": label, "method": "task_vector"} for label in labels],
        }
    )  # fmt: skip


def results_of(comparison: Comparison, *cells: CellResult) -> Results:
    rows = [Row(e, "", [c for c in cells if c.cell.label == e.label], []) for e in comparison.methods]
    return Results(rows, [], "people")


def test_a_record_says_what_the_cells_were(tmp_path: Path) -> None:
    path, comparison = tmp_path / "cells.json", comparison_of("a", "b")
    cells = [made_up("a", 0), made_up("a", 1, steps=2), made_up("b", 0, p=0.5)]
    write_record(path, comparison, results_of(comparison, *cells), {})
    found = read_record(path)
    assert sorted(found) == ["a/seed0", "a/seed1", "b/seed0"]
    for cell in cells:
        assert found[cell.cell.name].quantities() == cell.quantities()
        assert (found[cell.cell.name].state, found[cell.cell.name].made) == (cell.state, cell.made)
        assert found[cell.cell.name].steps[0].requests == cell.steps[0].requests


def test_what_is_not_made_anew_stays_on_record(tmp_path: Path) -> None:
    """A table that shows less than the record, by other attacks or a longer sweep, takes nothing from it."""
    path, comparison = tmp_path / "cells.json", comparison_of("a", "b")
    first = [made_up("a", 0), made_up("b", 0)]
    write_record(path, comparison, results_of(comparison, *first), {})
    newer = made_up("a", 0, p=0.25)
    write_record(path, comparison, results_of(comparison, newer), read_record(path))
    found = read_record(path)
    assert found["a/seed0"].quantities() == newer.quantities()
    assert found["b/seed0"].quantities() == first[1].quantities()
    # A cell without what the attacks ask for now is not complete: it does not take the place of one that was.
    attacked = Comparison.model_validate({**comparison.model_dump(), "attacks": {"relearning": {}}})
    write_record(path, attacked, results_of(attacked, made_up("b", 0, p=0.75)), found)
    assert read_record(path)["b/seed0"].quantities() == first[1].quantities()
    write_record(path, comparison_of("b"), results_of(comparison_of("b")), found)
    assert list(read_record(path)) == ["b/seed0"], "a method that is compared no more"


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\n[]", "{}x", '["a"]', '[{"cell": {"label": "a"}}]', "5"])
def test_a_file_that_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    path.write_text(text)
    with pytest.raises(InputError, match="cells.json: not the record of a comparison"):
        read_record(path)
    assert read_record(tmp_path / "none.json") == {} == read_record(None)
