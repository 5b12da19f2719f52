"""The certificate of one decided request: what was asked, done, measured and judged, and what that does not prove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

from alkn.files import digest_of
from alkn.report.facts import Decided
from alkn.report.intervals import METHOD, interval_of

KIND = "alkn.certificate"
FORMAT = 1
FACTS = ("request", "chain", "digests", "method", "seed", "code", "environment", "metrics", "attacks", "gates")
"""What ``alkn certificate verify`` finds in the project too and compares, leaf by leaf."""
CANONICAL = "RFC 8785 (JSON Canonicalization Scheme) of the value of 'certificate', UTF-8"
COMPANIONS = {"probability_p95": "95th percentile", "probability_worst": "best-known record"}
"""Numbers beside a metric that are no mean, so that they have no interval."""
BOUNDS = ("_low", "_high")
"""A metric that knows its own interval gives it under its name with these endings."""


def certificate_of(facts: Decided, *, project: str, issued: date, key: str, program: str) -> dict[str, Any]:
    """The document that is signed: names, numbers, digests and fixed sentences, no text of any record.

    Args:
        facts: the request.
        project: the project's name.
        issued: the day of the signature.
        key: fingerprint of the signing key.
        program: name and version of what writes it.
    """
    metrics, without = metrics_of(facts)
    return {
        "kind": KIND,
        "format": FORMAT,
        "project": project,
        "forgotten": facts.accepted,
        "statement": statement(facts),
        "request": request_of(facts),
        "chain": {"previous": facts.manifest["previous"], "earlier": list(facts.manifest["earlier"])},
        "method": {name: facts.params[name] for name in ("method", "targets", "lora") if name in facts.params},
        "seed": str(facts.manifest["seed"]),
        "metrics": metrics,
        "intervals": intervals_of(facts),
        "attacks": attacks_of(facts),
        "gates": facts.gate["gates"],
        "not_measured": [{"what": what, "why": why} for what, why in not_measured(facts, without)],
        "limits": limits(facts),
        "digests": digests_of(facts),
        "code": dict(facts.manifest["code"]),
        "environment": dict(facts.manifest["environment"]),
        "made": facts.manifest["made"],
        "issued": issued.isoformat(),
        "issuer": {"key": key, "program": program},
        "signed_form": CANONICAL,
    }


def intervals_of(facts: Decided) -> str:
    """How the intervals beside the numbers were made."""
    own = METHOD if facts.per_record is not None else "none: the step has no per_record.json"
    levels = sorted({f"{sample['confidence']:.0%}" for sample in facts.evaluation.get("sampled", {}).values()})
    drawn = f"; where a sample was drawn: bounds for all records of the set, by betting, {', '.join(levels)}"
    return own + (drawn if levels else "")


def statement(facts: Decided) -> str:
    """The verdict in one or two sentences."""
    if facts.accepted:
        return (
            f"The {facts.entry.records} records of request {facts.id} were unlearned from the model on"
            f" {facts.entry.decided}, and the resulting model passed every gate that was asked."
        )
    return (
        f"Request {facts.id} was NOT carried out: the records were NOT forgotten. The model that was made for it failed"
        " a gate and was not taken into use; this request changed nothing in the model in use."
        f" The gate's words: {facts.entry.reason}"
    )


def metrics_of(facts: Decided) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Every number of the evaluation with what stands beside it.

    Returns:
        Set -> metric -> ``value``, and where they exist ``interval``, ``before`` (the model before the request),
        ``base``, ``reference`` (digest -> value); then reason -> the numbers that have no interval because of it.
    """
    found: dict[str, Any] = {}
    without: dict[str, list[str]] = {}
    for set_name, row in facts.evaluation["sets"].items():
        found[set_name] = {
            metric: _beside(facts, set_name, metric, float(value), without)
            for metric, value in row.items()
            if isinstance(value, int | float) and not _is_bound(metric, row)
        }
    model = {}
    for metric, value in facts.evaluation["model"].items():
        model[metric] = {"value": float(value)} | {
            name: float(other["model"][metric])
            for name, other in (("before", facts.parent), ("base", facts.base))
            if metric in other.get("model", {})
        }
    return found | ({"model": model} if model else {}), without


def attacks_of(facts: Decided) -> dict[str, Any]:
    """Attack -> what it spent and what came back."""
    return {name: dict(curve) for name, curve in (facts.attacks or {}).items() if name != "missing"}


def not_measured(facts: Decided, without_interval: Mapping[str, list[str]]) -> Iterator[tuple[str, str]]:
    """What has no number, and why; what shares a metric and a reason stands together."""
    yield from grouped(facts.evaluation["missing"])
    for name, sample in facts.evaluation.get("sampled", {}).items():
        yield (
            f"{sample['of'] - sample['records']} of the {sample['of']} records of {name}",
            "a sample was drawn of them",
        )
    if facts.attacks is None:
        yield "attacks", "the step has no attacks.json: it was made without attacks"
    else:
        for what, why in facts.attacks.get("missing", {}).items():
            yield f"attack {what}", why
        for name, curve in attacks_of(facts).items():
            for what, why in curve.get("missing", {}).items():
                yield f"attack {name} on {what}", why
    for name, verdict in facts.gate["gates"].items():
        if verdict["passed"] is None:
            yield f"gate {name}", verdict["reason"]
    if not facts.honest:
        yield "distance from a model that never saw the records", "there is no reference model without this request"
    if facts.per_record is None:
        yield "intervals", "the step has no per_record.json: it was made by a version that did not write it"
    for why, numbers in without_interval.items():
        yield f"intervals of {', '.join(sorted(set(numbers)))}", why


def grouped(missing: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """``set.metric`` -> reason as one line a metric and reason."""
    lines: dict[tuple[str, str], list[str]] = {}
    for name, why in missing.items():
        where, _, metric = name.rpartition(".")
        lines.setdefault((metric, why), []).append(where)
    for (metric, why), places in lines.items():
        yield f"{metric} on {', '.join(places)}" if all(places) else metric, why


def digests_of(facts: Decided) -> dict[str, Any]:
    """Digests of what went in and came out, and of the manifest that holds them."""
    return {
        "inputs": dict(facts.manifest["inputs"]),
        "outputs": dict(facts.manifest["outputs"]),
        "manifest": digest_of(facts.step.manifest),
    }


def limits(facts: Decided) -> list[str]:
    """What this document does not prove, in plain words."""
    said = [
        "It says what was measured, with the questions, metrics and attacks that are listed, within the budgets that"
        " are listed. It does not prove that no trace is left in the weights, nor that no other question, no larger"
        " budget and no other attack brings something back.",
        "The base model, every model before this step and the step's task vector still hold the knowledge wherever a"
        " copy exists. The records themselves are kept to check later steps. Deleting them is the owner's decision.",
        "It speaks of the model with the digest given here, and of no copy, earlier release or later model.",
        "Copies of the data outside this model (indexes, caches, logs, other models, backups) are not looked at.",
        "Intervals show how much the records differ from one another. They do not show how much another seed, another"
        " machine or another training would differ.",
        "The digest of the request's file is keyed: only who has the key can check that a file is the one that was"
        " asked for. Whether the records are all that exists about a person is not checked.",
        "Dates come from the ledger and the clock of the machine; no third party has stamped them.",
        "The signature proves that the holder of the key issued this document and that nothing in it was changed since."
        " It does not prove that what it says is true: 'dvc repro --force' in the project makes the model again.",
    ]
    if facts.accepted:
        return said
    return [
        "The numbers are those of the rejected model, which is not in use. They say nothing about the model in use.",
        *said,
    ]


def request_of(facts: Decided) -> dict[str, Any]:
    """What was asked for, and when; ``late`` is ``None`` where no due day was set."""
    entry = facts.entry
    late = None if entry.due is None or entry.decided is None else entry.decided > entry.due
    return {
        "id": facts.id,
        "verdict": "accepted" if facts.accepted else "rejected",
        "records": entry.records,
        "received": entry.received,
        "due": entry.due,
        "decided": entry.decided,
        "late": late,
        "reason": entry.reason,
        "overlaps": dict(entry.overlaps),
    }


def _is_bound(metric: str, row: Mapping[str, Any]) -> bool:
    """Whether a number is an end of another one's interval."""
    return any(metric.endswith(end) and metric.removesuffix(end) in row for end in BOUNDS)


def _beside(facts: Decided, set_name: str, metric: str, value: float, without: dict[str, list[str]]) -> dict[str, Any]:
    row: dict[str, Any] = {"value": value}
    sampled = facts.evaluation.get("sampled", {}).get(set_name)
    bounds = [facts.evaluation["sets"][set_name].get(f"{metric}{end}") for end in BOUNDS]
    if None not in bounds:
        row["interval"] = [float(bound) for bound in bounds]
    elif sampled is not None:
        # Of the records drawn alone it would say nothing about those that were not.
        if metric in sampled["intervals"]:
            row["interval"] = list(sampled["intervals"][metric])
        elif metric not in COMPANIONS:
            without.setdefault("it was measured on a sample", []).append(metric)
    elif facts.per_record is not None and metric not in COMPANIONS:
        records = facts.per_record.get(set_name, {}).get(metric)
        interval = "it has no values per record" if records is None else interval_of(value, records)
        if isinstance(interval, str):
            without.setdefault(interval, []).append(metric)
        else:
            row["interval"] = list(interval)
    before = facts.before if set_name == "forget" else facts.parent.get("sets", {}).get(set_name, {})
    base = facts.base_row(set_name)
    if metric in before:
        row["before"] = float(before[metric])
    if metric in base:
        row["base"] = float(base[metric])
    reference = facts.reference_values(set_name, metric)
    row |= {"reference": reference} if reference else {}
    return row
