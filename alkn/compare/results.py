"""What the cells of a comparison came to: numbers a cell, statistics over seeds, the choice of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alkn.compare.cell import (
    ahead_file,
    belongs,
    chain_of,
    ground_of,
    key_of,
    outdated,
    project_of,
    requests_of,
    splits_of,
    state_file,
)
from alkn.compare.config import Cell, Comparison, Entry, chosen_domain
from alkn.compare.final import final_file, wanted_of
from alkn.compare.made import Made, asked_of
from alkn.files import read_json
from alkn.manifest import read_manifest
from alkn.project import Project, Step
from alkn.report import words


@dataclass(frozen=True)
class Level:
    """P and exact memorization of a set of records; ``None`` where it could not be computed."""

    p: float | None
    exact_memorization: float | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Level:
        """From a set's row in evaluation.json."""
        return cls(row.get("probability"), row.get("exact_memorization"))

    def excess(self, limits: Level) -> float:
        """How far above the targets: the larger ratio, at most 1 where both are met; infinite if not computed."""

        def ratio(value: float | None, limit: float | None) -> float:
            if value is None or limit is None:
                return math.inf
            return value / limit if limit > 0 else (0.0 if value == 0 else math.inf)

        return max(ratio(self.p, limits.p), ratio(self.exact_memorization, limits.exact_memorization))


@dataclass(frozen=True)
class StepResult:
    """The model after one request, or before any (``request`` is then empty).

    Attributes:
        request: the request's id.
        requests: every request of the chain -> its level under this model.
        drawn, never: utility domain -> P of the half drawn on, and of the half never drawn on.
        passes: record passes that the request cost.
        seconds: wall time of its unlearning; ``None`` if an interrupted run lost it.
    """

    request: str
    requests: Mapping[str, Level]
    drawn: Mapping[str, float]
    never: Mapping[str, float]
    passes: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class CellResult:
    """A cell that is over.

    Attributes:
        cell: which.
        state: ``done`` or ``diverged``.
        reason: why it diverged.
        limits: the targets as numbers.
        chain: the ids of its requests, also of those that a divergence left out; a trial has the first ones.
        base: the model before any request.
        steps: the model after each request.
        asked: a digest of its settings, see :func:`alkn.compare.made.asked_of`.
        splits: a digest of its data.
        made: by which code, when and where.
        final: what was measured of the last model alone, see :mod:`alkn.compare.final`.
    """

    cell: Cell
    state: str
    reason: str
    limits: Level
    chain: Sequence[str]
    base: StepResult
    steps: Sequence[StepResult]
    asked: str
    splits: str
    made: Made
    final: Mapping[str, Any] = field(default_factory=dict)

    def reached(self, step: StepResult) -> bool:
        """Whether a request met both targets right after its own step."""
        return step.requests[step.request].excess(self.limits) <= 1

    @property
    def reached_count(self) -> int:
        """Requests that met the targets."""
        return sum(map(self.reached, self.steps))

    @property
    def attacks(self) -> list[str]:
        """The attacks that were asked for."""
        return list(self.final.get("inputs", {}).get("attacks", {}))

    def quantities(self) -> dict[str, float | None]:
        """The numbers of the table. A diverged cell has no model to judge, only a count."""
        out: dict[str, float | None] = {"reached": float(self.reached_count)}
        if self.state != "done":
            return out
        own = [step.requests[step.request] for step in self.steps]
        last = self.steps[-1]
        end = [last.requests[request] for request in self.chain]
        seconds = [step.seconds for step in self.steps]
        out |= {
            "p": _worst([level.p for level in own]),
            "em": _worst([level.exact_memorization for level in own]),
            "p_end": _worst([level.p for level in end]),
            "em_end": _worst([level.exact_memorization for level in end]),
        }
        out |= {f"drawn/{domain}": value for domain, value in last.drawn.items()}
        out |= {f"never/{domain}": value for domain, value in last.never.items()}
        out["passes"] = float(sum(step.passes for step in self.steps))
        out["seconds"] = sum(s for s in seconds if s is not None) if None not in seconds else None
        for name in self.attacks:
            curve = self.final.get(name)
            out[f"attack/{name}"] = curve["points"][-1][words.about(curve)[0][0]] if curve is not None else None
        tests = self.final.get("forget_quality", {}).values()
        if tests:
            out |= dict.fromkeys(("quality_min", "quality_median", "quality_honest"))
        if len(tests) == len(self.chain):  # of a part of the requests they would say nothing about the chain
            p_values = [test["p_value"] for test in tests]
            out |= {"quality_min": min(p_values), "quality_median": statistics.median(p_values)}
            honest = [value for test in tests for value in test["honest"].values()]
            out["quality_honest"] = statistics.median(honest) if honest else None
        return out


@dataclass(frozen=True)
class Spread:
    """A number over the seeds that have it, ``n``. ``std`` is the sample's (n − 1) and missing for one seed."""

    n: int
    mean: float
    std: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """Over the values that are there; ``None`` if there is none."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        low, high = min(known), max(known)
        # Rounding can put the mean of equal numbers a bit beside them.
        return cls(len(known), min(max(statistics.fmean(known), low), high), std, low, high)


@dataclass(frozen=True)
class Row:
    """One method over its seeds.

    Attributes:
        entry: the method.
        variant: the values that its sweep chose; empty without a sweep.
        cells: those that are over.
        missing: those that are not.
    """

    entry: Entry
    variant: str
    cells: Sequence[CellResult]
    missing: Sequence[Cell]

    @property
    def title(self) -> str:
        """Label and chosen values."""
        return f"{self.entry.label} ({self.variant})" if self.variant else self.entry.label

    @property
    def done(self) -> list[CellResult]:
        """The cells whose chain came to its end."""
        return [cell for cell in self.cells if cell.state == "done"]

    def spreads(self) -> dict[str, Spread | None]:
        """Every quantity over the seeds."""
        rows = [cell.quantities() for cell in self.cells]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: Spread.of([row.get(name) for row in rows]) for name in names}


@dataclass(frozen=True)
class Trial:
    """One variant of a sweep on its first seed, and whether it was chosen."""

    label: str
    result: CellResult
    chosen: bool


@dataclass(frozen=True)
class Results:
    """Everything that a comparison came to so far.

    Attributes:
        rows: one a method, in the order of the file.
        trials: the sweeps.
        domain: the utility domain by which sweeps chose.
    """

    rows: Sequence[Row]
    trials: Sequence[Trial]
    domain: str

    @property
    def cells(self) -> list[CellResult]:
        """Every cell that is over, those of the sweeps too, each once."""
        every = [*(cell for row in self.rows for cell in row.cells), *(trial.result for trial in self.trials)]
        return list({result.cell.name: result for result in every}.values())

    @property
    def missing(self) -> list[Cell]:
        """Cells of the table that are not made yet."""
        return [cell for row in self.rows for cell in row.missing]


Record = Mapping[str, CellResult]
"""Name of a cell -> what it came to, wherever it was made."""


def collect(folder: Path, comparison: Comparison, record: Record) -> Results:
    """Read what is there, in this folder or on record. A cell counts when its state file is there."""
    rows: list[Row] = []
    trials: list[Trial] = []
    for entry in comparison.methods:
        tried, missing = _read(folder, comparison, record, comparison.trials(entry))
        best = None if missing or not tried else choose(tried, comparison.choose_by)
        trials += [Trial(entry.label, result, result is best) for result in tried]
        if missing:
            rows.append(Row(entry, "", [], missing))
            continue
        variant = best.cell.variant if best else ""
        rows.append(Row(entry, variant, *_read(folder, comparison, record, comparison.cells(entry, variant))))
    every = [*(cell for row in rows for cell in row.cells), *(trial.result for trial in trials)]
    domain = chosen_domain(comparison.choose_by, list(every[0].base.never)) if every else ""
    return Results(rows, trials, domain)


def _read(
    folder: Path, comparison: Comparison, record: Record, cells: Sequence[Cell]
) -> tuple[list[CellResult], list[Cell]]:
    """Those that are over, and those that are not."""
    found = {cell: read_cell(folder, comparison, record, cell) for cell in cells}
    return [result for result in found.values() if result], [cell for cell, result in found.items() if not result]


def choose(results: Sequence[CellResult], domain: str | None) -> CellResult:
    """The best of a sweep: most utility never drawn on among those that reached every target.

    Where none did: most requests reached, then the smallest excess over the targets.

    Args:
        results: the variants on the first seed.
        domain: utility domain; ``None``: the first.

    Raises:
        InputError: if nobody measured that domain.
    """
    chosen = chosen_domain(domain, list(results[0].base.never))

    def key(result: CellResult) -> tuple[float, ...]:
        if result.state != "done":
            return (-1.0, float(result.reached_count), 0.0)
        utility = result.steps[-1].never.get(chosen, 0.0)
        if result.reached_count == len(result.chain):
            return (1.0, utility, 0.0)
        excess = max(step.requests[step.request].excess(result.limits) for step in result.steps)
        return (0.0, float(result.reached_count), -excess)

    return max(results, key=key)


def read_cell(folder: Path, comparison: Comparison, record: Record, cell: Cell) -> CellResult | None:
    """A cell that is over and was made with the present settings, here or elsewhere, or ``None``."""
    made = made_here(folder, comparison, cell)
    return made if is_complete(made, comparison) else _recorded(folder, comparison, record, cell) or made


def made_here(folder: Path, comparison: Comparison, cell: Cell) -> CellResult | None:
    """The same, of what was made in this folder alone."""
    project, ground = project_of(folder, cell), ground_of(folder, cell.seed)
    path = state_file(folder, cell)
    if not path.is_file() or read_manifest(ground.base) is None:
        return None
    state = read_json(path)
    if state["requests"] != chain_of(comparison, cell, requests_of(ground)):
        return None
    if state["key"] != key_of(ground, comparison.cell_settings(cell)) or outdated(state):
        return None
    limits = Level(state["limits"]["p"], state["limits"]["exact_memorization"])
    chain = state["requests"]
    final = read_json(final_file(project)) if final_file(project).is_file() else {}
    return CellResult(
        cell=cell,
        state=state["state"],
        reason=state.get("reason", ""),
        limits=limits,
        chain=chain,
        base=_base(ground),
        steps=[_step(project.step(request)) for request in chain[: state["steps"]]],
        asked=asked_of(comparison, cell),
        splits=splits_of(ground),
        made=Made(**state["made"]),
        final={} if cell.trial else _wanted(final, comparison),
    )


def _recorded(folder: Path, comparison: Comparison, record: Record, cell: Cell) -> CellResult | None:
    """A cell on record: of the same settings, and of the same data as the seed's, where they are here."""
    found, ground = record.get(cell.name), ground_of(folder, cell.seed)
    if found is None or found.asked != asked_of(comparison, cell):
        return None
    if belongs(ground, comparison.ground_settings(cell.seed)) and found.splits != splits_of(ground):
        return None
    return replace(found, final=_wanted(found.final, comparison))


def is_complete(result: CellResult | None, comparison: Comparison) -> bool:
    """Whether nothing of a cell is left to make."""
    if result is None or result.state != "done":
        return result is not None
    return result.cell.trial or bool(result.final) or not any(wanted_of(comparison).values())


def _wanted(final: Mapping[str, Any], comparison: Comparison) -> Mapping[str, Any]:
    """The content of a final.json, if it holds what the settings ask for now."""
    wanted = wanted_of(comparison)
    return final if {name: final.get("inputs", {}).get(name) for name in wanted} == wanted else {}


def _base(ground: Project) -> StepResult:
    sets = read_json(ground.base.evaluation)["sets"]
    known = {name.split("/", 1)[1]: Level.of(row) for name, row in sets.items() if name.startswith("known/")}
    return StepResult("", known, _domains(sets, "retain"), _domains(sets, "utility"))


def _step(step: Step) -> StepResult:
    sets = read_json(step.evaluation)["sets"]
    report, manifest = read_json(step.unlearning), read_manifest(step) or {}
    levels = {step.id: Level.of(sets["forget"])}
    levels |= {name.split("/", 1)[1]: Level.of(row) for name, row in sets.items() if name.startswith("earlier/")}
    levels |= {name: Level.of(row) for name, row in read_json(ahead_file(step)).items()}
    return StepResult(
        step.id,
        levels,
        _domains(sets, "retain"),
        _domains(sets, "utility"),
        report["passes"],
        manifest.get("seconds", {}).get("unlearn"),
    )


def _domains(sets: Mapping[str, Any], split: str) -> dict[str, float]:
    rows = {name.split("/", 1)[1]: row for name, row in sets.items() if name.startswith(f"{split}/")}
    return {domain: row["probability"] for domain, row in rows.items() if "probability" in row}


def _worst(values: Sequence[float | None]) -> float | None:
    """The largest; ``None`` if one could not be computed."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
