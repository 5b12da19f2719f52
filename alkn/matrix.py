"""The regression matrix: what every model of the chain knows of every request so far, and how useful it is.

Forgotten stays forgotten if, in a request's column, everything from its own step on is small. The number of
cells grows with the square of the number of requests, so a cell of a large request is measured on a sample
of its records, with an interval (:func:`alkn.core.sampling.mean_interval`); asked for exactly, on all.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alkn.core.measured import Measured
from alkn.core.sampling import mean_interval
from alkn.core.scoring import Progress, no_progress, score
from alkn.encoding import Encoder
from alkn.errors import ChainBroken, InputError
from alkn.files import digest_of, digest_of_value, keyed_digest_of, write_json
from alkn.manifest import read_manifest
from alkn.models import load_model
from alkn.project import Project, Step
from alkn.record_sets import Records, by_domain, earlier_records, load_split
from alkn.requests.ledger import ATTESTED, BASE, erased_requests, load_ledger
from alkn.runtime import Runtime
from alkn.score_cache import Known, ScoreCache, metric_version
from alkn.settings import Settings, load_settings

FORMAT = 1


@dataclass(frozen=True)
class Group:
    """A request's records, or those of a utility domain.

    Attributes:
        name: ``request/<id>`` or ``utility/<domain>``.
        records: those that are measured.
        chosen: their numbers in the order in which they were drawn.
        of: how many records there are.
        digest: keyed digest of them.
    """

    name: str
    records: Records
    chosen: Sequence[int]
    of: int
    digest: str


@dataclass(frozen=True)
class Matrix:
    """The matrix and what it cost.

    Attributes:
        content: of reports/matrix.json, see :func:`regression_matrix`.
        scored: records that were measured now, summed over models.
        kept: records whose numbers an earlier call had kept.
        told: files of the cache that were not what was written.
    """

    content: dict[str, Any]
    scored: int
    kept: int
    told: Sequence[str]


def regression_matrix(
    project: Project, settings: Settings, *, exact: bool = False, progress: Progress = no_progress
) -> Matrix:
    """Measure every accepted model, and the base, on every accepted request and utility domain.

    Args:
        project: with a base model.
        settings: how many records of a request are measured, and the confidence of the intervals.
        exact: measure all records.
        progress: told about every model.

    Returns:
        ``content``: ``models`` and ``requests``, ids in the chain's order; ``cells`` -> model -> request ->
        ``probability``, ``exact_memorization``, ``records``, ``of``, ``error`` (the larger of the two distances
        between a number and the end of its interval), ``confidence`` (of each interval by itself), ``intervals``;
        ``utility`` and ``utility_exact_memorization`` -> model -> domain -> value; ``missing`` ->
        ``model.request/<id>`` or ``model.utility/<domain>`` -> why it was not measured; ``digests``.

    Raises:
        InputError: if there is no base model.
        ChainBroken: if a model or a request's file is not what its manifest says.
    """
    if read_manifest(project.base) is None:
        raise InputError("there is no base model yet; 'alkn run' makes it")
    requests = list(load_ledger(project).accepted)
    models = [BASE, *requests]
    limit = None if exact else settings.verification.records
    erased = erased_requests(project, requests)
    groups = [_request(project, name, limit) for name in requests if name not in erased] + _utility(project)
    cache = ScoreCache(project.private / "cache", project.key())
    content: dict[str, Any] = {
        "format": FORMAT, "models": models, "requests": requests, "cells": {}, "utility": {},
        "utility_exact_memorization": {}, "missing": {},
        "digests": {"models": {}, "records": {group.name: group.digest for group in groups}},
        "metric_version": metric_version(),
    }  # fmt: skip
    scored = kept = 0
    for done, model in enumerate(models):
        progress("matrix", done, len(models))
        digest = _model_digest(project.step(model))
        content["digests"]["models"][model] = digest
        known, new = _measured(project.step(model), digest, groups, cache)
        scored, kept = scored + new, kept + sum(map(len, known.values())) - new
        _enter(content, model, groups, known, settings.evaluation.confidence)
        content["missing"] |= {f"{model}.request/{name}": ATTESTED for name in erased}
    progress("matrix", len(models), len(models))
    write_json(project.root / "reports" / "matrix.json", content)
    return Matrix(content, scored, kept, tuple(cache.told))


def _request(project: Project, request_id: str, limit: int | None) -> Group:
    manifest, path = read_manifest(project.step(request_id)), project.request(request_id)
    if manifest is None:
        raise ChainBroken(f"steps/{request_id}: the step is in the chain, but its manifest is missing")
    digest = keyed_digest_of(path, project.key()) if path.is_file() else ""
    if digest != manifest["inputs"]["request"]:
        raise ChainBroken(f"data/requests/{request_id}.jsonl is not the file that steps/{request_id} was made from")
    sample = earlier_records(project, request_id, limit)
    return Group(f"request/{request_id}", sample.records, sample.drawn, sample.of, digest)


def _utility(project: Project) -> list[Group]:
    groups = []
    for domain, records in by_domain(load_split(project, "utility")).items():
        text = json.dumps(records, sort_keys=True).encode()
        digest = f"hmac-sha256:{hmac.digest(project.key(), text, 'sha256').hex()}"
        numbers = [int(record["id"]) for record in records]
        groups.append(Group(f"utility/{domain}", records, numbers, len(records), digest))
    return groups


def _model_digest(step: Step) -> str:
    """The digest of a step's model; where its folder is gone, what the manifest says.

    Raises:
        ChainBroken: if the two differ.
    """
    manifest = read_manifest(step)
    if manifest is None:
        raise ChainBroken(f"steps/{step.id}: the step is in the chain, but its manifest is missing")
    stated = str(manifest["outputs"]["model"])
    if step.model.exists() and digest_of(step.model) != stated:
        raise ChainBroken(f"steps/{step.id}/model was changed after it was made; its manifest has another digest")
    return stated


def _measured(
    step: Step, digest: str, groups: Sequence[Group], cache: ScoreCache
) -> tuple[dict[str, dict[int, Known]], int]:
    """Group -> record number -> scores, and how many of them were measured now; a group may lack some or all."""
    settings = load_settings(step.params)
    made = digest_of_value(settings.data.model_dump(mode="json"))
    keys = {
        group.name: {"model": digest, "records": group.digest, "data": made, "metric": metric_version()}
        for group in groups
    }
    stored = {group.name: cache.load(keys[group.name]) for group in groups}
    lacking = {
        group.name: [record for record in group.records if int(record["id"]) in wanted]
        for group in groups
        if (wanted := set(group.chosen) - set(stored[group.name]))
    }
    new: dict[str, dict[int, Known]] = {}
    if lacking and step.model.exists():
        new = _score(step, settings, lacking)
        for name, numbers in new.items():
            stored[name] |= numbers
            cache.save(keys[name], stored[name])
    known = {
        group.name: {number: stored[group.name][number] for number in group.chosen if number in stored[group.name]}
        for group in groups
    }
    return known, sum(map(len, new.values()))


def _score(step: Step, settings: Settings, wanted: Mapping[str, Records]) -> dict[str, dict[int, Known]]:
    """Score the records of all groups in one go, so that batches hold records of similar length whosever they are."""
    remote = settings.base.trust_remote_code
    runtime = Runtime(settings.run)
    encoder = Encoder.of(step.model, settings)
    sets = {name: encoder.record_set(name, records) for name, records in wanted.items()}
    model = load_model(step.model, device=runtime.device, trust_remote_code=remote)
    scores = score(model, [example for one in sets.values() for example in one.examples])
    found: dict[str, dict[int, Known]] = {}
    begin = 0
    for name, one in sets.items():
        part = slice(begin, begin + len(one))
        begin += len(one)
        p = Measured.mean(one.ids, scores.probability[part]).per_record
        hits = Measured.mean(one.ids, scores.exact_memorization[part]).per_record
        if p and hits:  # a model that answers with what is no number is not measured, and asked again next time
            found[name] = {number: (p[number], hits[number]) for number in p}
    return found


def _enter(
    content: dict[str, Any],
    model: str,
    groups: Sequence[Group],
    known: Mapping[str, Mapping[int, Known]],
    confidence: float,
) -> None:
    for part in ("cells", "utility", "utility_exact_memorization"):
        content[part][model] = {}
    for group in groups:
        kind, name = group.name.split("/", 1)
        numbers = known[group.name]
        if len(numbers) < len(group.chosen) or not numbers:
            content["missing"][f"{model}.{group.name}"] = "the model is not here, or its scores are not finite numbers"
            continue
        drawn = [numbers[number] for number in group.chosen]
        if kind == "request":
            content["cells"][model][name] = _cell(drawn, group.of, confidence)
        else:
            content["utility"][model][name] = math.fsum(p for p, _ in drawn) / len(drawn)
            content["utility_exact_memorization"][model][name] = math.fsum(hits for _, hits in drawn) / len(drawn)


def _cell(drawn: Sequence[Known], of: int, confidence: float) -> dict[str, Any]:
    cell: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}
    error = 0.0
    for at, name in enumerate(("probability", "exact_memorization")):
        values = [min(1.0, record[at]) for record in drawn]
        cell[name] = math.fsum(values) / len(values)
        low, high = mean_interval(values, of, confidence=confidence)
        intervals[name] = [low, high]
        error = max(error, high - cell[name], cell[name] - low)
    whole = len(drawn) == of
    return cell | {
        "records": len(drawn), "of": of, "error": 0.0 if whole else error, "confidence": 1.0 if whole else confidence,
        "intervals": intervals,
    }  # fmt: skip
