"""The chain as rows: what ``alkn report`` shows, derived from ledger, manifests and metrics."""

from __future__ import annotations

from typing import Any

from alkn.files import read_json
from alkn.manifest import read_manifest
from alkn.project import Project
from alkn.requests.ledger import Ledger


def chain_rows(project: Project, ledger: Ledger) -> list[dict[str, Any]]:
    """One row a request, decided ones first, in the order of the ledger's lists; what is not there is ``None``.

    ``steps`` counts what ``method.steps`` limits: optimizer steps, or rounds of a method that works in rounds.
    """
    return [
        _row(project, ledger, request_id, verdict)
        for verdict in ("accepted", "rejected", "pending", "withdrawn")
        for request_id in getattr(ledger, verdict)
    ]


def _row(project: Project, ledger: Ledger, request_id: str, verdict: str) -> dict[str, Any]:
    entry, step = ledger.entry(request_id), project.step(request_id)
    row: dict[str, Any] = {
        "request": request_id, "verdict": verdict, "records": entry.records, "received": entry.received,
        "due": entry.due, "previous": entry.previous, "reason": entry.reason,
    }  # fmt: skip
    manifest = read_manifest(step)
    if manifest is None or not (step.evaluation.is_file() and step.unlearning.is_file()):
        return row
    metrics, report, base = read_json(step.evaluation), read_json(step.unlearning), read_json(project.base.evaluation)
    forget = metrics["sets"]["forget"]
    return row | {
        "p_before": report["rounds"][0]["p"],
        "p_after": forget.get("probability"),
        "worst_record": next(iter(forget.get("worst_records", ())), None),
        "worst_p": forget.get("probability_worst"),
        "em_before": report["rounds"][0]["exact_memorization"],
        "em_after": forget.get("exact_memorization"),
        "utility": {
            name.split("/", 1)[1]: values.get("probability")
            for name, values in metrics["sets"].items()
            if name.startswith("utility/")
        },
        "utility_base": {
            name.split("/", 1)[1]: values["probability"]
            for name, values in base["sets"].items()
            if name.startswith("utility/")
        },
        "steps": int(report["rounds"][-1]["round"]),
        "passes": report["passes"],
        "seconds": sum(manifest["seconds"].values()),
    }
