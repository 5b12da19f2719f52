"""The evaluation of one model on every set of the project, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from alkn import registry
from alkn.core.measured import Measured
from alkn.core.probe import Probe, RecordSet
from alkn.core.scoring import Progress, no_progress
from alkn.encoding import Encoder
from alkn.settings import Evaluation

WORST = 5


@dataclass(frozen=True)
class Measurements:
    """What was measured of one model.

    Attributes:
        sets: set -> metric -> value or reason, with the records' values.
        model: metric -> value or reason.
    """

    sets: Mapping[str, Mapping[str, Measured]]
    model: Mapping[str, Measured]

    def numbers(self) -> dict[str, Any]:
        """The content of evaluation.json.

        ``sets`` -> set -> metric -> value, with the 95th percentile and the worst record numbers of P;
        ``model`` -> metric -> value; ``missing`` -> ``set.metric`` -> the reason.
        """
        return _as_numbers(self.sets, self.model)

    def per_record(self) -> dict[str, Any]:
        """The content of per_record.json: set -> metric -> record number, as text -> value; no text of a record."""
        return {
            set_name: {
                name: {str(number): value for number, value in result.per_record.items()}
                for name, result in measured.items()
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
) -> Measurements:
    """Every metric on every set.

    Args:
        model: read back from disk, at its stored precision, on its device.
        sets: named ``forget``, ``earlier/<id>``, ``retain/<domain>``, ``utility/<domain>``, ``holdout``.
        encoder: decodes what the model writes.
        settings: which metrics, and where the model writes answers.
        eos: end-of-sequence id.
        progress: told about every set.
    """
    measured: dict[str, dict[str, Measured]] = {}
    for done, records in enumerate(sets):
        progress("evaluate", done, len(sets))
        generate = records.name.split("/")[0] in settings.generate
        probe = Probe(
            model,
            records,
            decode=encoder.decode,
            eos=eos,
            max_new_tokens=settings.max_new_tokens if generate else None,
        )
        measured[records.name] = {
            name: registry.metrics[name].call(probe, registry.Params())
            for name in settings.metrics
            if registry.metrics[name].scope == "records"
        }
    progress("evaluate", len(sets), len(sets))
    utility = {n.split("/", 1)[1]: m for n, m in measured.items() if n.startswith("utility/")}
    whole = {
        name: registry.metrics[name].call(utility, registry.Params())
        for name in settings.metrics
        if registry.metrics[name].scope == "model"
    }
    return Measurements(measured, whole)


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
        row: dict[str, Any] = {}
        for name, result in values.items():
            if result.value is None:
                missing[f"{set_name}.{name}"] = result.reason
            else:
                row[name] = result.value
        knowledge = values.get("probability")
        if knowledge is not None and knowledge.per_record:
            row["probability_p95"] = knowledge.percentile(95)
            worst = sorted(knowledge.per_record.items(), key=lambda item: (-item[1], item[0]))
            row["probability_worst"] = worst[0][1]
            row["worst_records"] = [number for number, _ in worst[:WORST]]
        sets[set_name] = row
    model = {name: result.value for name, result in whole.items() if result.value is not None}
    missing |= {name: result.reason for name, result in whole.items() if result.value is None}
    return {"sets": sets, "model": model, "missing": missing}
