"""What lies on disk about decided requests, read once: the only part of the report that opens files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alkn.errors import ChainBroken, InputError
from alkn.files import digest_of, read_json, read_jsonl
from alkn.manifest import read_manifest
from alkn.project import Project, Step
from alkn.requests.ledger import BASE, Entry, Ledger, load_ledger

Numbers = Mapping[str, Any]
NEEDED = ("unlearning.json", "evaluation.json", "gate.json")
EVIDENCE = ("per_record.json", "attacks.json")
"""Outputs that steps of earlier versions did not write; where a manifest has them, they are needed too."""


@dataclass(frozen=True)
class Decided:
    """A request with a verdict, and the files of its step.

    Attributes:
        id: of the request.
        entry: of the ledger.
        accepted: the verdict.
        step: the paths.
        manifest: the seal.
        evaluation, unlearning, gate: the files of those names.
        params: the frozen settings.
        parent, base: evaluations of the model it started from and of the base model; empty if not there.
        per_record: set -> metric -> record number -> value; ``None`` if not there.
        attacks: attack -> curve; ``None`` if not there.
        references: digest of a model that never saw the records -> its numbers on them, where written down.
        known: of this and the earlier requests those that are the benchmark's of that name.
    """

    id: str
    entry: Entry
    accepted: bool
    step: Step
    manifest: Numbers
    evaluation: Numbers
    unlearning: Numbers
    gate: Numbers
    params: Numbers
    parent: Numbers
    base: Numbers
    per_record: Numbers | None
    attacks: Numbers | None
    references: Mapping[str, Numbers]
    known: frozenset[str]

    @property
    def before(self) -> Numbers:
        """P and exact memorization of the request's records in the model before it, under the evaluation's names."""
        first = self.unlearning["rounds"][0]
        return {"probability": first["p"], "exact_memorization": first["exact_memorization"]}

    @property
    def honest(self) -> list[str]:
        """Digests of the models that never saw the records and that a number is here of."""
        return sorted({*self.references, *self.evaluation.get("ceiling", {})})

    def reference_values(self, set_name: str, metric: str) -> dict[str, float]:
        """Digest of a model that never saw the records -> its own number on one of the step's sets."""
        found = {}
        if set_name == "forget":
            found = {digest: known[metric] for digest, known in self.references.items() if metric in known}
        for digest, sets in self.evaluation.get("ceiling", {}).items():
            if isinstance(sets.get(set_name, {}).get(metric), int | float):
                found[digest] = sets[set_name][metric]
        return {digest: float(value) for digest, value in found.items()}

    def base_row(self, set_name: str) -> Numbers:
        """The base model's numbers on one of the step's sets; on forgotten records, where they were measured."""
        sets = self.base.get("sets", {})
        request = self.id if set_name == "forget" else set_name.partition("earlier/")[2]
        if request:
            return dict(sets.get(f"known/{request}", {})) if request in self.known else {}
        return dict(sets.get(set_name, {}))


def read_decided(project: Project, request_id: str, *, check: bool = True) -> Decided:
    """Everything about one decided request.

    Args:
        project: that holds it.
        request_id: accepted or rejected.
        check: hold every output against its digest first; a model that was deleted since is no fault.

    Raises:
        InputError: if the ledger does not know the request, or it is not decided.
        ChainBroken: if a file of its step that is needed is missing or, checked, not what its manifest says.
    """
    ledger = load_ledger(project)
    verdict = _verdict(ledger, request_id)
    step = project.step(request_id)
    manifest = read_manifest(step)
    if manifest is None:
        raise ChainBroken(f"steps/{step.id}: the request is {verdict}, and its manifest is missing")
    changed = [name for name, state in outputs_now(step, manifest).items() if state == "changed"] if check else []
    if changed:
        raise ChainBroken(
            f"steps/{step.id}/{changed[0]} was changed after it was made; its manifest has another digest"
        )
    needed = (*NEEDED, *(name for name in EVIDENCE if name in manifest["outputs"]))
    gone = [name for name in needed if not (step.folder / name).is_file()]
    if gone:
        raise ChainBroken(f"steps/{step.id}/{gone[0]} is missing; 'dvc checkout' brings it back")
    if manifest["accepted"] != (verdict == "accepted"):
        raise ChainBroken(f"steps/{step.id}: the ledger says {verdict}, and the step's manifest the other verdict")
    return Decided(
        id=request_id,
        entry=ledger.entry(request_id),
        accepted=verdict == "accepted",
        step=step,
        manifest=manifest,
        evaluation=read_json(step.evaluation),
        unlearning=read_json(step.unlearning),
        gate=read_json(step.gate),
        params=yaml.safe_load(step.params.read_text(encoding="utf-8")) if step.params.is_file() else {},
        parent=optional(project.step(manifest["previous"]).evaluation) or {},
        base=optional(project.step(BASE).evaluation) or {},
        per_record=optional(step.per_record),
        attacks=optional(step.attacks),
        references=references_of(project, request_id),
        known=frozenset(
            name for name in (request_id, *manifest["earlier"]) if _is_benchmarks(project, name, ledger.entry(name))
        ),
    )


def check_beside(project: Project, facts: Decided) -> None:
    """What is told beside a step's own numbers: its frozen settings, and the evaluations of its parent and of the base.

    Raises:
        ChainBroken: if one of them is missing, or not what the manifest that holds it says.
    """
    inputs, base = facts.manifest["inputs"], read_manifest(project.base) or {"outputs": {}}
    for path, digest in (
        (facts.step.params, inputs["settings"]),
        (project.step(facts.manifest["previous"]).evaluation, inputs["parent_evaluation"]),
        (project.base.evaluation, base["outputs"].get("evaluation.json")),
    ):
        name = path.relative_to(project.root).as_posix()
        if not path.is_file():
            raise ChainBroken(f"{name} is missing; 'git checkout' or 'dvc checkout' brings it back")
        if digest_of(path) != digest:
            raise ChainBroken(f"{name} was changed after it was made; the manifest has another digest")


def _is_benchmarks(project: Project, request_id: str, entry: Entry) -> bool:
    """Whether a request holds what the benchmark's file of that name does, on which the base model was measured."""
    theirs, ours = project.splits / "forget" / f"{request_id}.jsonl", project.request(request_id)
    if not theirs.is_file() or not ours.is_file():
        return entry.source is not None
    texts = [
        [{name: value for name, value in row.items() if name not in ("id", "salt")} for row in read_jsonl(path)]
        for path in (theirs, ours)
    ]
    return texts[0] == texts[1]


def outputs_now(step: Step, manifest: Numbers) -> dict[str, str]:
    """What became of each output that the manifest holds: ``same``, ``changed`` or ``missing``."""
    found = {}
    for name, digest in manifest["outputs"].items():
        path = step.folder / name
        found[name] = "missing" if not path.exists() else "same" if digest_of(path) == digest else "changed"
    return found


def references_of(project: Project, request_id: str) -> dict[str, Numbers]:
    """Digest of each reference model that was trained without a request -> its numbers on the request's records."""
    found: dict[str, Numbers] = {}
    for path in sorted((project.root / "reference").glob("*/manifest.json")):
        manifest = read_json(path)
        if request_id in (manifest.get("without") or ()):
            found[str(manifest["outputs"]["model"])] = dict(manifest.get("forgotten", {}).get(request_id, {}))
    return found


def optional(path: Path) -> dict[str, Any] | None:
    """A JSON file's content, or ``None`` if there is no such file."""
    return dict(read_json(path)) if path.is_file() else None


def _verdict(ledger: Ledger, request_id: str) -> str:
    ledger.entry(request_id)
    verdict = str(ledger.where(request_id))
    if verdict not in ("accepted", "rejected"):
        raise InputError(f"request {request_id!r} is {verdict}: there is no verdict on it that could be certified")
    return verdict
