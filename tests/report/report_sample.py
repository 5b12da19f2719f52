"""A decided chain written by hand: every file that the report reads, with numbers that a test knows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from alkn.files import digest_of, keyed_digest_of, write_bytes, write_json, write_jsonl, write_yaml
from alkn.manifest import write_manifest
from alkn.project import Project, Step
from alkn.requests.ledger import Entry, Ledger, save_ledger

SECRETS = ("Wilhelmina Quastenflosser", "lives at 17 Rosengarten Lane", "Where does Wilhelmina live?")
"""What stands in the records of every request, and must stand nowhere else."""
RECORDS = 6
DOMAIN = "<b>shop & co</b>"
"""A domain of the utility set that a page must escape."""


def make_sample(root: Path) -> Project:
    """Accepted r001 and r002, rejected r003, pending r004; r002 with attacks; a reference without r001 and r002."""
    project = Project(root.resolve())
    project.root.mkdir(parents=True, exist_ok=True)
    project.key(create=True)
    write_bytes(project.params, b"project: {name: sample}\n")
    write_bytes(project.splits / "retain.jsonl", b"{}\n")
    ledger = Ledger()
    for number, request in enumerate(("r001", "r002", "r003", "r004"), 1):
        rows = [{"id": i, "question": SECRETS[2], "answer": " ".join(SECRETS[:2]) + f" {i}"} for i in range(RECORDS)]
        write_jsonl(project.request(request), [{**row, "salt": f"{number}{row['id']}"} for row in rows])
        write_jsonl(project.splits / "forget" / f"{request}.jsonl", rows)
        entry = Entry(
            received=f"2026-10-0{number}", due=f"2026-11-0{number}", records=RECORDS,
            digest=keyed_digest_of(project.request(request), project.key()),
            overlaps={"retain": 2} if request == "r002" else {},
        )  # fmt: skip
        ledger.pending[request] = entry
    _write_base(project)
    for request, previous, accepted in (("r001", "base", True), ("r002", "r001", True), ("r003", "r002", False)):
        write_step(project, request, previous, tuple(ledger.accepted), accepted)
        entry = ledger.pending.pop(request)
        reason = None if accepted else "utility: facts kept of base 0.2, limit 0.9"
        decided = {"previous": previous, "decided": "2026-11-02", "reason": reason}
        (ledger.accepted if accepted else ledger.rejected)[request] = entry.model_copy(update=decided)
    save_ledger(project, ledger)
    _write_reference(project)
    return project


def values(seed: int, level: float) -> dict[str, float]:
    """A value a record around a level."""
    drawn = random.Random(seed)
    return {str(i): min(1.0, max(0.0, level * drawn.uniform(0.5, 1.5))) for i in range(RECORDS)}


def measured(sets: dict[str, float], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """An evaluation and its values per record, from a level of P a set."""
    rows: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for i, (name, level) in enumerate(sets.items()):
        own = {"probability": values(seed + i, level), "exact_memorization": values(seed + i + 50, level)}
        records[name] = own
        rows[name] = {metric: sum(v.values()) / len(v) for metric, v in own.items()}
        rows[name] |= {"loss_auc": 0.6, "loss_auc_low": 0.5, "loss_auc_high": 0.7}
        rows[name] |= {"truth_ratio": 0.4, "probability_p95": max(own["probability"].values()), "worst_records": [3, 1]}
    missing = {"holdout.rouge_l": "evaluation.generate does not name this set", "model_utility": "no utility set"}
    return {"sets": rows, "model": {}, "missing": missing}, records


def write_step(project: Project, request: str, previous: str, earlier: tuple[str, ...], accepted: bool) -> Step:
    """One sealed step."""
    step, seed = project.step(request), int(request[1:]) * 100
    sets = {"forget": 0.02, **{f"earlier/{name}": 0.03 for name in earlier}, "retain/facts": 0.6, "holdout": 0.01}
    evaluation, records = measured({**sets, f"utility/{DOMAIN}": 0.5}, seed)
    write_bytes(step.model / "model.safetensors", request.encode() * 100)
    write_bytes(step.task_vector, b"vector")
    write_bytes(step.state, b"state")
    rounds = [{"round": i, "p": 0.6 / (i + 1), "exact_memorization": 0.9 / (i + 1), "scale": 1.0} for i in range(8)]
    write_json(
        step.unlearning,
        {"reached": True, "passes": 80, "task_vector": {"nonzero": 9, "norm": 1.5}, "rounds": rounds},
    )
    if request == "r002":
        evaluation["ceiling"] = {"sha256:ceiling": {"retain/facts": {"probability": 0.655, "worst_records": [1]}}}
    write_json(step.evaluation, evaluation)
    write_json(step.per_record, records)
    write_json(step.metrics, {"forget": {"probability": evaluation["sets"]["forget"]["probability"]}})
    p = {"what": "P, mean", "value": evaluation["sets"]["forget"]["probability"], "limit": 0.05, "passed": True}
    kept = {"what": "facts kept of base", "value": 0.2, "limit": 0.9, "passed": accepted}
    gates = {
        "forgetting": {"passed": True, "reason": "", "checks": [p]},
        "utility": {"passed": accepted, "reason": "", "checks": [kept]},
        "robustness": {"passed": None, "reason": "there is no attack", "checks": []},
    }
    write_json(step.gate, {"accepted": accepted, "failed": [], "gates": gates})
    if request == "r002":
        write_json(step.attacks, attacks())
    targets = {"p": 0.05, "exact_memorization": "holdout", "margin": 0.8}
    params = {"method": {"name": "alkn", "preset": "rounds", "lr": 0.001}, "targets": targets}
    write_yaml(step.params, params)
    parent = project.step(previous)
    inputs = {
        "request": keyed_digest_of(project.request(request), project.key()), "parent": digest_of(parent.model),
        "parent_evaluation": digest_of(parent.evaluation), "splits": digest_of(project.splits),
        "settings": digest_of(step.params), "base": digest_of(project.base.model),
        "base_evaluation": digest_of(project.base.evaluation),
    }  # fmt: skip
    facts = {"previous": previous, "earlier": list(earlier), "accepted": accepted, "failed": []}
    outputs = tuple(path for path in step.outputs if path.exists())
    write_manifest(step, inputs=inputs, outputs=outputs, seed=2**60, facts={**facts, "seconds": {"unlearn": 1.0}})
    return step


def attacks() -> dict[str, Any]:
    """A curve that rises and one whose budget falls, and an attack that could not be run."""

    def point(at: int, p: float) -> dict[str, Any]:
        own = {"probability": p, "exact_memorization": p / 2}
        return {"at": at, **own, "requests": {"r001": own, "r002": own}, "utility": {"facts": 0.5}}

    relearning = [point(0, 0.02), point(5, 0.1), point(20, 0.45)]
    return {
        "relearning": {"unit": "steps", "points": relearning, "budget": {"share": 0.1, "lr": 5e-4}, "missing": {}},
        "quantization": {"unit": "bits", "points": [point(8, 0.02), point(4, 0.07)], "budget": {}, "missing": {}},
        "missing": {"paraphrase": "no record has a paraphrased question"},
    }


def _write_base(project: Project) -> None:
    base = project.base
    known = {f"known/{name}": 0.7 for name in ("r001", "r002", "r003", "r004")}
    sets = {"retain/facts": 0.65, f"utility/{DOMAIN}": 0.65, "holdout": 0.01, **known}
    evaluation, records = measured(sets, 1)
    write_bytes(base.model / "model.safetensors", b"base" * 100)
    write_json(base.evaluation, evaluation)
    write_json(base.per_record, records)
    write_json(base.metrics, {})
    write_manifest(
        base, inputs={}, outputs=(base.model, base.evaluation, base.per_record, base.metrics), seed=0, facts={}
    )


def _write_reference(project: Project) -> None:
    step = Step(project.root / "reference" / "abc")
    write_bytes(step.model / "model.safetensors", b"honest")
    own = {"probability": 0.012, "exact_memorization": 0.08}
    facts = {"without": ["r001", "r002"], "forgotten": {"r001": own, "r002": own}, "retain": {"facts": 0.66}}
    write_manifest(step, inputs={}, outputs=(step.model,), seed=1, facts=facts)
