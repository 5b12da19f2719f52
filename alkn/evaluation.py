"""The evaluation of one model on every set of the project, as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from alkn import registry
from alkn.core.measured import Measured
from alkn.core.probe import Probe, RecordSet, References
from alkn.core.scoring import Progress, no_progress
from alkn.core.view import View
from alkn.encoding import Encoder
from alkn.settings import Evaluation

WORST = 5
HOLDOUT = "holdout"

ReferencesOf = Callable[[str], References]
"""A set's name -> the set under models that never saw it."""


def none_of(set_name: str) -> References:
    """The default :data:`ReferencesOf`: there is no reference model."""
    return References()


@dataclass(frozen=True)
class Measurements:
    """What was measured of one model.

    Attributes:
        sets: set -> metric -> value or reason, with the records' values.
        model: metric -> value or reason.
        ceiling: digest of a reference model -> set -> metric -> its own value.
    """

    sets: Mapping[str, Mapping[str, Measured]]
    model: Mapping[str, Measured]
    ceiling: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """The content of evaluation.json.

        ``sets`` -> set -> metric -> value, with the 95th percentile and the worst record numbers of P;
        ``model`` -> metric -> value; ``missing`` -> ``set.metric`` -> the reason; ``ceiling``, where there is a
        reference model: digest -> set -> metric -> value.
        """
        return _as_numbers(self.sets, self.model) | ({"ceiling": dict(self.ceiling)} if self.ceiling else {})

    def per_record(self) -> dict[str, Any]:
        """The content of per_record.json: set -> metric -> record number, as text -> value; no text of a record."""
        return {
            set_name: {
                name: {str(number): value for number, value in result.per_record.items()}
                for name, result in _with_parts(measured).items()
                if result.per_record
            }
            for set_name, measured in self.sets.items()
        }


def measure_model(
    model: nn.Module,
    sets: Sequence[RecordSet],
    encoder: Encoder,
    settings: Evaluation,
    *,
    eos: int,
    progress: Progress = no_progress,
    references: ReferencesOf = none_of,
    base: Callable[[], nn.Module] | None = None,
) -> Measurements:
    """Every metric on every set.

    Args:
        model: read back from disk, at its stored precision, on its device.
        sets: named ``forget``, ``earlier/<id>``, ``retain/<domain>``, ``utility/<domain>``, ``holdout``.
        encoder: decodes what the model writes.
        settings: which metrics, and where the model writes answers.
        eos: end-of-sequence id.
        progress: told about every set.
        references: a set's name -> the set under reference models.
        base: loads the model that the chain began with, where ``model`` is not that one.
    """
    probes = _probes(model, sets, encoder, settings, eos, references)
    measured: dict[str, dict[str, Measured]] = {}
    for done, (name, probe) in enumerate(probes.items()):
        progress("evaluate", done, len(sets))
        measured[name] = _measured(probe, settings)
    progress("evaluate", len(sets), len(sets))
    view = View(measured, probes, model, encoder, eos, base)
    whole = {
        chosen.name: registry.metrics[chosen.name].call(view, chosen.params)
        for chosen in settings.metrics
        if registry.metrics[chosen.name].scope == "model"
    }
    return Measurements(measured, whole, _ceiling(probes, settings))


def _measured(probe: Probe, settings: Evaluation) -> dict[str, Measured]:
    """The metrics of single sets that make sense on this one."""
    entries = [(registry.metrics[chosen.name], chosen.params) for chosen in settings.metrics]
    return {
        entry.name: entry.call(probe, params)
        for entry, params in entries
        if entry.scope == "records" and entry.looks_at(probe.records.name)
    }


def _ceiling(probes: Mapping[str, Probe], settings: Evaluation) -> dict[str, dict[str, Any]]:
    """What an honest model says: each set under the first reference model that never saw it."""
    found: dict[str, dict[str, Any]] = {}
    for name, probe in probes.items():
        if probe.references.first is not None:
            digest = next(iter(probe.references.probes))
            # What compares with a reference has no value here: it is one.
            found.setdefault(digest, {})[name] = _row(_measured(probe.references.first, settings))[0]
    return found


def _probes(
    model: nn.Module,
    sets: Sequence[RecordSet],
    encoder: Encoder,
    settings: Evaluation,
    eos: int,
    references: ReferencesOf,
) -> dict[str, Probe]:
    """The model before each set; the holdout's is known to all others."""
    probes: dict[str, Probe] = {}
    for records in sorted(sets, key=lambda one: one.name != HOLDOUT):
        probes[records.name] = Probe(
            model,
            records,
            decode=encoder.decode,
            eos=eos,
            max_new_tokens=settings.answer_length(records.name),
            holdout=probes.get(HOLDOUT),
            references=partial(references, records.name),
        )
    return {records.name: probes[records.name] for records in sets}


def evaluate_model(
    model: nn.Module,
    sets: Sequence[RecordSet],
    encoder: Encoder,
    settings: Evaluation,
    *,
    eos: int,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The numbers of :func:`measure_model` alone, see :meth:`Measurements.numbers`."""
    return measure_model(model, sets, encoder, settings, eos=eos, progress=progress).numbers()


def headline(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that say most: P of the forget set, the worst earlier request, P of each utility domain."""
    sets = evaluation["sets"]
    row = sets.get("forget", {})
    names = ("probability", "probability_p95", "probability_worst", "exact_memorization", "rouge_l")
    out: dict[str, Any] = {"forget": {name: row[name] for name in names if name in row}} if row else {}
    earlier = [values for name, values in sets.items() if name.startswith("earlier/")]
    if earlier:
        out["earlier_worst"] = {
            name: max(values[name] for values in earlier)
            for name in ("probability", "exact_memorization")
            if all(name in values for values in earlier)
        }
    out["utility"] = {
        name.split("/", 1)[1]: values["probability"]
        for name, values in sets.items()
        if name.startswith("utility/") and "probability" in values
    }
    return out | dict(evaluation["model"])


def _as_numbers(measured: Mapping[str, Mapping[str, Measured]], whole: Mapping[str, Measured]) -> dict[str, Any]:
    sets: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for set_name, values in measured.items():
        sets[set_name], reasons = _row(values)
        missing |= {f"{set_name}.{name}": reason for name, reason in reasons.items()}
        knowledge = values.get("probability")
        if knowledge is not None and knowledge.per_record:
            row = sets[set_name]
            row["probability_p95"] = knowledge.percentile(95)
            worst = sorted(knowledge.per_record.items(), key=lambda item: (-item[1], item[0]))
            row["probability_worst"] = worst[0][1]
            row["worst_records"] = [number for number, _ in worst[:WORST]]
    model, reasons = _row(whole)
    return {"sets": sets, "model": model, "missing": missing | reasons}


def _row(values: Mapping[str, Measured]) -> tuple[dict[str, Any], dict[str, str]]:
    """Metric -> value, and metric -> why it has none."""
    flat = _with_parts(values)
    row = {name: result.value for name, result in flat.items() if result.value is not None}
    return row, {name: result.reason for name, result in flat.items() if result.value is None}


def _with_parts(values: Mapping[str, Measured]) -> dict[str, Measured]:
    """The metrics, each followed by its parts as ``metric_part``."""
    flat: dict[str, Measured] = {}
    for name, result in values.items():
        flat[name] = result
        flat |= {f"{name}_{part}": value for part, value in result.parts.items()}
    return flat
