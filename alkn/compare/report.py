"""The report of a comparison: table.md, table.csv, sweep.csv, cells.json and the plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alkn.compare import plots
from alkn.compare.config import Comparison
from alkn.compare.record import CELLS, cell_row
from alkn.compare.results import Results, Row, Spread
from alkn.files import write_bytes, write_json

Form = Callable[[float], str]


def write_report(folder: Path, comparison: Comparison, results: Results, *, pictures: bool = True) -> list[Path]:
    """Write ``folder/report``.

    Args:
        folder: of the comparison.
        comparison: its settings.
        results: what there is so far.
        pictures: the plots too, which take seconds.

    Returns:
        The files written, numbers first.
    """
    out = folder / "report"
    write_bytes(out / "table.md", table_page(comparison, results).encode())
    write_bytes(out / "table.csv", _csv(table_rows(results)))
    write_bytes(out / "sweep.csv", _csv(sweep_rows(results)))
    write_json(out / CELLS, [cell_row(cell) for cell in results.cells])
    files = [out / name for name in ("table.md", "table.csv", "sweep.csv", CELLS)]
    return files + (plots.write_plots(out, results) if pictures and results.cells else [])


def table_rows(results: Results) -> list[dict[str, Any]]:
    """One flat row a method: ``<quantity> mean|std|min|max|n`` over its seeds; what is not there is ``None``."""
    rows = []
    for row in results.rows:
        flat: dict[str, Any] = {
            "method": row.entry.label,
            "variant": row.variant,
            "seeds": " ".join(str(cell.cell.seed) for cell in row.cells),
            "diverged": sum(cell.state == "diverged" for cell in row.cells),
            "missing": len(row.missing),
            "targets reached": sum(cell.reached_count for cell in row.cells),
            "requests": sum(len(cell.chain) for cell in row.cells),
        }
        spreads = row.spreads()
        for name in quantity_names(results):
            spread = spreads.get(name)
            flat |= {
                f"{name} {part}": None if spread is None else value
                for part, value in _parts(spread or Spread(0, 0, None, 0, 0)).items()
            }
        rows.append(flat)
    return rows


def quantity_names(results: Results) -> list[str]:
    """The quantities that any cell has, without the count, in their order."""
    names = dict.fromkeys(name for cell in results.cells for name in cell.quantities())
    return [name for name in names if name != "reached"]


def sweep_rows(results: Results) -> list[dict[str, Any]]:
    """One flat row a variant of a sweep, on its first seed."""
    return [
        {
            "method": trial.label, "variant": trial.result.cell.variant, "seed": trial.result.cell.seed,
            "state": trial.result.state, "targets reached": trial.result.reached_count,
            "requests": len(trial.result.chain), "chosen": trial.chosen,
            **{name: value for name, value in trial.result.quantities().items() if name != "reached"},
        }
        for trial in results.trials
    ]  # fmt: skip


def table_page(comparison: Comparison, results: Results) -> str:
    """The Markdown page: the table, the sweeps, what fell short, what is not there yet, the notes."""
    lines = [f"# {comparison.name}", ""]
    if results.missing:
        lines += [f"**Not complete: {len(results.missing)} cells are still to be made.**", ""]
    if results.cells:
        lines += [*_main_table(results), "", *_reading(results), ""]
    lines += _sweep_table(results) + _shortfalls(results) + _not_measured(results)
    if comparison.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in comparison.notes), ""]
    return "\n".join(lines)


def _main_table(results: Results) -> list[str]:
    names = quantity_names(results)
    lines = _head(["method", "seeds", "targets reached", *map(_heading, names)])
    lines.append(_line(["base model", "", "", *_base_cells(results, names)]))
    for row in results.rows:
        if not row.cells:
            lines.append(_line([row.title, "not made yet", *[""] * (len(names) + 1)]))
            continue
        spreads = row.spreads()
        reached, asked = sum(c.reached_count for c in row.cells), sum(len(c.chain) for c in row.cells)
        cells = [_spread(spreads.get(name), _form(name), of=len(row.done)) for name in names]
        lines.append(_line([row.title, _seeds(row), f"{reached}/{asked}", *cells]))
    return lines


def _base_cells(results: Results, names: Sequence[str]) -> list[str]:
    """The base models of all seeds, where a quantity has a meaning before any request."""
    bases = list({cell.cell.seed: cell.base for cell in results.cells}.values())
    out = []
    for name in names:
        values: list[float | None] = []
        kind, _, domain = name.partition("/")
        for base in bases:
            if kind in ("p", "em"):
                own = [level.p if kind == "p" else level.exact_memorization for level in base.requests.values()]
                values.append(max((v for v in own if v is not None), default=None))
            elif kind in ("drawn", "never"):
                values.append(getattr(base, kind).get(domain))
        out.append(_spread(Spread.of(values), _form(name)))
    return out


def _reading(results: Results) -> list[str]:
    limits = results.cells[0].limits
    return [
        "Mean over seeds ± standard deviation of the sample, smallest and largest value below. P: probability of the"
        " right answer per token; exact memorization: share of answer tokens predicted right. *Worst request* is the"
        " largest value over the requests, each right after its own step; *worst at the end*, under the last model."
        " Utility is P under the last model, on the half of each domain that methods may draw on and on the half that"
        " none ever does. *Targets reached* counts requests, right after their own step, over all seeds: here"
        f" P ≤ {_number(limits.p)} and exact memorization ≤ {_number(limits.exact_memorization)}"
        + (" (with targets `holdout`, those of the first seed)." if _limits_differ(results) else "."),
    ]


def _limits_differ(results: Results) -> bool:
    return len({cell.limits for cell in results.cells}) > 1


def _sweep_table(results: Results) -> list[str]:
    if not results.trials:
        return []
    names = ["p", "em", f"never/{results.domain}", "passes"]
    longest = max(len(trial.result.chain) for trial in results.trials)
    lines = [f"## Sweeps, on the first seed and the first {'request' if longest == 1 else f'{longest} requests'}", ""]
    lines += _head(["method", "values", "targets reached", *map(_heading, names), "chosen"])
    entries = {row.entry.label: row.entry for row in results.rows}
    for trial in results.trials:
        numbers = trial.result.quantities()
        cells = [_one(numbers.get(name), _form(name)) for name in names]
        reached = f"{trial.result.reached_count}/{len(trial.result.chain)}"
        values = trial.result.cell.variant + (" (diverged)" if trial.result.state == "diverged" else "")
        edge = entries[trial.label].edge(trial.result.cell.variant)
        chosen = ", ".join(filter(None, ("yes", edge))) if trial.chosen else ""
        lines.append(_line([trial.label, values, reached, *cells, chosen]))
    return [
        *lines, "",
        f"Chosen: the most utility never drawn on ({results.domain}) among the values that reached every target; where"
        " none did, most requests reached, then the smallest excess over the targets. *Lowest* and *highest*: the sweep"
        " ends there, and what lies beyond was not tried.", "",
    ]  # fmt: skip


def _shortfalls(results: Results) -> list[str]:
    """Each request of the table's cells that missed a target, and each chain that broke off."""
    lines = []
    for row in results.rows:
        for cell in row.cells:
            for step in cell.steps:
                if not cell.reached(step):
                    level = step.requests[step.request]
                    numbers = [_number(level.p), _number(level.exact_memorization)]
                    lines.append(_line([row.title, str(cell.cell.seed), step.request, "target not reached", *numbers]))
            if cell.state == "diverged":
                request = cell.chain[len(cell.steps)]
                lines.append(_line([row.title, str(cell.cell.seed), request, "diverged; the chain ends", "", ""]))
    if not lines:
        return []
    head = _head(["method", "seed", "request", "what", "P", "exact memorization"])
    return ["## Targets not reached", "", *head, *lines, "", "A chain goes on from the model that it has.", ""]


def _not_measured(results: Results) -> list[str]:
    """What was asked for of a chain's last model and is not there, with the reason."""
    lines = [
        _line([row.title, str(cell.cell.seed), name, reason])
        for row in results.rows
        for cell in row.cells
        for name, reason in cell.final.get("missing", {}).items()
        if name != "forget_quality"  # nobody asked: there is no reference
    ]
    return ["## Not measured", "", *_head(["method", "seed", "what", "why"]), *lines, ""] if lines else []


HEADINGS = {
    "p": "P of forget sets, worst request",
    "em": "exact memorization, worst request",
    "p_end": "P, worst at the end",
    "em_end": "exact memorization, worst at the end",
    "passes": "record passes",
    "seconds": "seconds",
    "quality_min": "forget quality, smallest p-value",
    "quality_median": "forget quality, median p-value",
    "quality_honest": "of a second reference, median p-value",
}


def _heading(name: str) -> str:
    kind, _, domain = name.partition("/")
    if kind == "drawn":
        return f"{domain}, half drawn on"
    if kind == "never":
        return f"**{domain}, never drawn on**"
    if kind == "attack":
        return f"after {domain}" if domain == "sampling" else f"P after {domain}"
    return HEADINGS.get(name, name)


def _form(name: str) -> Form:
    if name in ("passes", "seconds"):
        return lambda value: f"{value:,.0f}"
    if name.startswith("quality"):
        return lambda value: f"{value:.2g}"
    return lambda value: f"{value:.4f}" if name in ("p", "p_end") else f"{value:.3f}"


def _spread(spread: Spread | None, form: Form, *, of: int = 0) -> str:
    """Mean, deviation and range; and of how many seeds, where they are fewer than the ``of`` that came to an end."""
    if spread is None:
        return ""
    fewer = f"<br>{spread.n} of {of} seeds" if spread.n < of else ""
    if spread.std is None:
        return form(spread.mean) + fewer
    return f"{form(spread.mean)} ± {form(spread.std)}<br>{form(spread.low)}–{form(spread.high)}{fewer}"


def _seeds(row: Row) -> str:
    left = len(row.missing)
    out = ", ".join(str(cell.cell.seed) for cell in row.cells)
    diverged = sum(cell.state == "diverged" for cell in row.cells)
    return out + (f"; {diverged} diverged" if diverged else "") + (f"; {left} not made yet" if left else "")


def _one(value: float | None, form: Form) -> str:
    return "" if value is None else form(value)


def _number(value: float | None) -> str:
    return "not computable" if value is None else f"{value:.4g}"


def _head(columns: Sequence[str]) -> list[str]:
    return [_line(columns), _line(["---"] * len(columns))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _parts(spread: Spread) -> dict[str, float | None]:
    return {"mean": spread.mean, "std": spread.std, "min": spread.low, "max": spread.high, "n": spread.n}


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """CSV with the columns of all rows; what a row lacks is empty, numbers at full precision."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
