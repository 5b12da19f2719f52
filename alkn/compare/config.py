"""The settings of a comparison, as one frozen, typed object, and the cells that they ask for."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from alkn import registry
from alkn.choices import explain
from alkn.errors import InputError
from alkn.registry import Params
from alkn.settings import Settings, read_mapping, validate_settings
from alkn.splits import FileParams

DEFAULTS: dict[str, dict[str, Any]] = {"run": {"threads": 1}, "evaluation": {"generate": []}, "attacks": {}}
"""Below the settings of the file: cells share the cores, writing answers is what costs in an evaluation, and
attacks are run on the last model."""


class Entry(Params):
    """One method of the comparison.

    Attributes:
        label: its name in tables, plots and folders.
        method: as in params.yaml: a registered name, or a mapping with ``name`` and parameters.
        seeds: its own seeds; ``null``: those of the comparison.
        sweep: parameter -> values; every combination is tried on the first seed, the best runs on all.
    """

    label: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,40}$")
    method: str | dict[str, Any]
    seeds: tuple[int, ...] | None = None
    sweep: dict[str, tuple[Any, ...]] = {}

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if seeds is None else _distinct(seeds)

    @field_validator("sweep")
    @classmethod
    def _some_values(cls, sweep: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in sweep.items():
            # Values become names of folders.
            if not values or not all(re.fullmatch(r"[\w.+-]{1,40}", _shown(value)) for value in values):
                raise ValueError(f"expected a list of numbers or words for {key}")
        return sweep

    def edge(self, variant: str) -> str:
        """``lowest`` or ``highest`` where the sweep of one number ends at this variant, else nothing."""
        swept = [(key, values) for key, values in self.sweep.items() if len(values) > 1]
        if len(swept) != 1:
            return ""
        ((key, values),) = swept
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return ""
        return {min(values): "lowest", max(values): "highest"}.get(self.variants()[variant][key], "")

    def variants(self) -> dict[str, dict[str, Any]]:
        """What the sweep asks for: a name such as ``lr=0.0001`` -> the method's mapping; without a sweep, one."""
        method = {"name": self.method} if isinstance(self.method, str) else self.method
        out = {}
        for values in itertools.product(*self.sweep.values()):
            changed = dict(zip(self.sweep, values, strict=True))
            out[",".join(f"{key}={_shown(value)}" for key, value in changed.items())] = {**method, **changed}
        return out


@dataclass(frozen=True)
class Cell:
    """One method with one seed: a whole chain, or the beginning of one.

    Attributes:
        label: the method's label.
        variant: which values of its sweep; empty without a sweep.
        seed: of the base model, the data and every step.
        trial: only the requests by which a sweep chooses; the whole cell goes on from there.
    """

    label: str
    variant: str
    seed: int
    trial: bool = False

    @property
    def folder(self) -> str:
        """Below ``cells/``, such as ``npo/lr=0.0001/seed0``."""
        return "/".join(part for part in (self.label, self.variant, f"seed{self.seed}") if part)

    @property
    def name(self) -> str:
        """Unlike that of any other cell: its folder, and whether it is a trial."""
        return f"{self.folder}/trial" if self.trial else self.folder

    @property
    def title(self) -> str:
        """For people: ``npo lr=0.0001 seed 0``."""
        parts = (self.label, self.variant, f"seed {self.seed}", "trial" if self.trial else "")
        return " ".join(part for part in parts if part)


class Comparison(Params):
    """What is compared with what. See docs/COMPARE.md for every key.

    Attributes:
        name: of the MLflow experiment.
        notes: what a reader of the table must know, such as what was not tuned; one bullet each.
        settings: of every cell, as in params.yaml, without ``seed`` and ``method``.
        seeds: the seeds of every method that names none.
        methods: what is compared, in the order of the table.
        choose_by: utility domain by which a sweep chooses; ``null``: the first of the benchmark.
        sweep_requests: requests of the chain by which a sweep chooses; ``null``: all.
        attacks: registered attack -> its parameters, run on each cell's last model.
        references: seeds of models trained without any request's records, one or more a seed of the comparison;
            forget quality is measured against the first. Empty: none.
        runner: Prefect task runner: threads of this machine, a Dask or a Ray cluster.
        workers: cells at a time; ``null``: what the machine has.
        keep: models that stay on disk once a cell is done.
    """

    name: str = Field("comparison", pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]{0,62}$")
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[Entry, ...] = Field(min_length=1)
    choose_by: str | None = None
    sweep_requests: int | None = Field(None, ge=1)
    attacks: dict[str, dict[str, Any]] = {}
    references: tuple[int, ...] = ()
    runner: Literal["threads", "dask", "ray"] = "threads"
    workers: int | None = Field(None, ge=1)
    keep: Literal["last", "all"] = "last"

    @field_validator("settings")
    @classmethod
    def _not_a_cells(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for key, where in (("seed", "'seeds'"), ("method", "the list 'methods'")):
            if key in settings:
                raise ValueError(f"expected no key {key!r} here: it stands in {where}")
        if not settings.get("benchmark"):
            raise ValueError("expected the key 'benchmark': its requests are the chain of every cell")
        return settings

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct(seeds)

    @field_validator("runner")
    @classmethod
    def _installed(cls, runner: str) -> str:
        package = f"prefect_{runner}"
        if runner != "threads" and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"expected the package {package.replace('_', '-')}, which is missing; pip install 'alkn[{runner}]'"
            )
        return runner

    @field_validator("attacks")
    @classmethod
    def _known_attacks(cls, attacks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, values in attacks.items():
            entry = registry.attacks[name]
            try:
                entry.params.model_validate(values)
            except ValidationError as error:
                raise InputError("\n".join(explain(error, entry.params, f"attacks.{name}."))) from None
        return attacks

    @model_validator(mode="after")
    def _one_of_each(self) -> Comparison:
        labels = [entry.label for entry in self.methods]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"methods: expected every label once, found twice: {', '.join(twice)}")
        return self

    def entry(self, label: str) -> Entry:
        """The method of a label.

        Raises:
            InputError: if there is none.
        """
        known = {entry.label: entry for entry in self.methods}
        if label not in known:
            raise InputError(registry.unknown_name("method label", label, known))
        return known[label]

    def only(self, labels: Sequence[str]) -> tuple[Entry, ...]:
        """The methods with these labels, or all if none is named, in the order of the file."""
        wanted = [self.entry(label).label for label in labels]
        return tuple(entry for entry in self.methods if not wanted or entry.label in wanted)

    def seeds_of(self, entry: Entry) -> tuple[int, ...]:
        """A method's seeds; a sweep chooses on the first."""
        return self.seeds if entry.seeds is None else entry.seeds

    def trials(self, entry: Entry) -> list[Cell]:
        """What a sweep chooses from: every variant on the first seed. Whole cells, if it goes by the whole chain."""
        if not entry.sweep:
            return []
        part = self.sweep_requests is not None
        return [Cell(entry.label, variant, self.seeds_of(entry)[0], part) for variant in entry.variants()]

    def cells(self, entry: Entry, variant: str = "") -> list[Cell]:
        """The whole cells of a method: every seed.

        Args:
            entry: the method.
            variant: what its sweep chose.
        """
        return [Cell(entry.label, variant, seed) for seed in self.seeds_of(entry)]

    def ground_settings(self, seed: int) -> Settings:
        """The settings of a seed's splits and base model."""
        return Settings.model_validate({**_below(self.settings, DEFAULTS), "seed": seed})

    def cell_settings(self, cell: Cell) -> Settings:
        """The settings of a cell's steps."""
        method = self.entry(cell.label).variants()[cell.variant]
        return Settings.model_validate({**_below(self.settings, DEFAULTS), "seed": cell.seed, "method": method})


def load_comparison(path: Path) -> Comparison:
    """Read a comparison's file and check it whole, the settings of every cell too.

    Raises:
        InputError: naming file, key, what was expected, what was found and the nearest known key.
    """
    values = read_mapping(path)
    try:
        comparison = Comparison.model_validate(values)
    except ValidationError as error:
        lines = explain(error, Comparison)
    except InputError as error:
        lines = str(error).split("\n")
    else:
        lines = _wrong_settings(comparison)
    if lines:
        raise InputError("\n".join(f"{path.name}: {line}" for line in lines))
    return comparison


def _wrong_settings(comparison: Comparison) -> list[str]:
    """What is wrong in the settings of the cells: first what they share, then each method."""
    common = {**_below(comparison.settings, DEFAULTS), "seed": comparison.seeds[0]}
    lines = _errors(common, "settings") or _relative_paths(common)
    if lines:
        return lines
    for number, entry in enumerate(comparison.methods):
        for variant, method in entry.variants().items():
            where = f"methods.{number} ({entry.label}{': ' if variant else ''}{variant})"
            lines += _errors({**common, "method": method}, where)
    return list(dict.fromkeys(lines))


def _relative_paths(values: Mapping[str, Any]) -> list[str]:
    """Paths are relative to a project, and a comparison's cells are many: which one would be meant?"""
    benchmark = Settings.model_validate(values).benchmark
    if benchmark is None or not isinstance(benchmark.params, FileParams):
        return []
    if benchmark.params.under(Path("/a")) == benchmark.params.under(Path("/b")):
        return []
    return ["settings.benchmark: expected absolute paths, and one is relative"]


def _errors(values: Mapping[str, Any], where: str) -> list[str]:
    try:
        validate_settings(values, Path(where))
    except InputError as error:
        return str(error).split("\n")
    return []


def _below(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``defaults`` where they say nothing, mappings key by key."""
    out = dict(values)
    for key, default in defaults.items():
        given = out.get(key)
        if isinstance(default, Mapping) and (given is None or isinstance(given, Mapping)):
            out[key] = _below(given or {}, default)
        else:
            out.setdefault(key, default)
    return out


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError("expected at least one seed, none twice, none below 0")
    return seeds


def _shown(value: Any) -> str:
    """A swept value as it stands in folders and tables."""
    return str(value)


def chosen_domain(domain: str | None, known: Sequence[str]) -> str:
    """The utility domain by which a sweep chooses: ``choose_by``, else the first of those that are measured.

    Raises:
        InputError: if ``choose_by`` is none of them.
    """
    if domain not in (None, *known):
        raise InputError(f"choose_by: {registry.unknown_name('utility domain', str(domain), list(known))}")
    return domain or next(iter(known), "")
