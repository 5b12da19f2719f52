"""The whole verification of the champion, made again: digests of the chain, its numbers, its gates, the attacks.

Nothing of what an earlier run wrote is believed: the model is read from disk and measured, and what comes out
is held against the recorded numbers and judged by the same gates. A forged manifest does not help whoever
changed a number or put a model's knowledge back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from alkn.attacking import attack_stored
from alkn.base import measure_base
from alkn.core.scoring import Progress, no_progress
from alkn.errors import AlknError, InputError
from alkn.files import digest_of, digest_of_value, keyed_digest_of, read_json, write_json
from alkn.manifest import code_version, read_manifest
from alkn.planning import limits_of
from alkn.project import Project, Step
from alkn.record_sets import splits_digest
from alkn.records import Plan
from alkn.requests.ledger import ATTESTED, BASE, Ledger, erased_requests, load_ledger
from alkn.runtime import Runtime
from alkn.settings import Settings, load_settings
from alkn.splits import path_under
from alkn.step import judge, measure_step

FORMAT = 1
Kind = Literal["changed", "differs", "returned", "unmeasured"]
Scalar = str | float | bool | None


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold.

    Attributes:
        kind: ``changed``: a file is not what a manifest or the ledger says; ``differs``: a number measured again is
            not the recorded one; ``returned``: a gate that passed fails now; ``unmeasured``: no number.
        where: a step's id, or a file of the project.
        what: file, metric or gate.
        expected: digest or number that was recorded.
        found: what is there now.
    """

    kind: Kind
    where: str
    what: str
    expected: Scalar = None
    found: Scalar = None


def verify_champion(project: Project, *, exact: bool = False, progress: Progress = no_progress) -> dict[str, Any]:
    """Verify the newest accepted model and the chain under it; writes reports/verify.json.

    Args:
        project: with a base model and the key of its digests.
        exact: measure all records of the earlier requests, also where the step was measured on samples.
        progress: told about what is measured.

    Returns:
        ``holds``; ``champion``, ``model`` (its digest); ``findings``, see :class:`Finding`; ``evaluation``: the fresh
        numbers; ``compared``: how many of them there are, and ``largest_difference`` from the recorded ones;
        ``gates`` and ``attacks`` of the fresh numbers; ``steps`` checked; ``missing`` -> reason; ``made``, ``code``.

    Raises:
        InputError: if there is no base model, or no key.
    """
    if read_manifest(project.base) is None:
        raise InputError("there is no base model yet; 'alkn run' makes it")
    ledger, tolerance = load_ledger(project), project.settings().verification.tolerance
    findings = list(_chain(project, ledger))
    step = project.step(ledger.newest)
    report: dict[str, Any] = {
        "format": FORMAT, "champion": step.id, "model": digest_of(step.model) if step.model.exists() else None,
        "exact": exact, "steps": [BASE, *ledger.accepted], "evaluation": {}, "compared": 0, "largest_difference": 0.0,
        "gates": {}, "attacks": {}, "missing": {},
    }  # fmt: skip
    try:
        findings += _measured_again(project, ledger, report, exact, tolerance, progress)
    except (AlknError, OSError, ValueError, KeyError) as error:
        # The words of other libraries may come from a file: of those the type says enough.
        reason = str(error) if isinstance(error, AlknError) else type(error).__name__
        report["missing"]["evaluation"] = f"the champion cannot be measured: {reason}"
        findings.append(Finding("unmeasured", step.id, "evaluation", found=type(error).__name__))
    report["findings"] = [asdict(finding) for finding in findings]
    report["holds"] = not findings
    report |= {"made": datetime.now(UTC).isoformat(timespec="seconds"), "code": code_version()}
    write_json(project.root / "reports" / "verify.json", report)
    return report


def _chain(project: Project, ledger: Ledger) -> Iterator[Finding]:
    """What of base, accepted steps and request files is not as manifests and ledger say."""
    key, previous, base = project.key(), BASE, (read_manifest(project.base) or {"outputs": {}})["outputs"]
    splits = splits_digest(project) or "none"
    for name in (BASE, *ledger.accepted):
        step, manifest = project.step(name), read_manifest(project.step(name))
        if manifest is None:
            yield Finding("changed", name, "manifest.json")
            continue
        for output, digest in manifest["outputs"].items():
            path = step.folder / output
            yield from _same(name, output, digest, digest_of(path) if path.exists() else None)
        stated = dict(manifest["inputs"])
        yield from _same(name, "params.yaml", stated.get("settings"), _settings_digest(step))
        yield from _same(name, "data/splits", stated.get("splits", splits), splits)
        yield from _texts(project, step, stated)
        if name == BASE:
            continue
        entry, path = ledger.accepted[name], project.request(name)
        if path.is_file() or not entry.erased:
            found = keyed_digest_of(path, key) if path.is_file() else None
            yield from _same(name, f"data/requests/{name}.jsonl", stated.get("request"), found)
        yield from _same(name, "data/ledger.yaml: digest", entry.digest, stated.get("request"))
        yield from _same(name, "data/ledger.yaml: previous", entry.previous, previous)
        yield from _same(name, "manifest.json: previous", manifest.get("previous"), previous)
        yield from _same(name, "manifest.json: accepted", True, manifest.get("accepted"))
        parent = (read_manifest(project.step(previous)) or {"outputs": {}})["outputs"]
        yield from _same(name, "manifest.json: parent's model", stated.get("parent"), parent.get("model"))
        # Manifests of earlier versions do not name it.
        for key_of, output in (("base", "model"), ("base_evaluation", "evaluation.json")):
            found = base.get(output)
            yield from _same(name, f"manifest.json: {key_of}", stated.get(key_of, found), found)
        evaluation = parent.get("evaluation.json")
        yield from _same(name, "manifest.json: parent's evaluation", stated.get("parent_evaluation"), evaluation)
        previous = name


def _texts(project: Project, step: Step, stated: Mapping[str, str]) -> Iterator[Finding]:
    """The user's own texts that a step was measured on."""
    if not any(name.startswith("text/") for name in stated):
        return
    for name, file in load_settings(step.params).evaluation.texts.items():
        path = Path(path_under(project.root, file))
        found = digest_of(path) if path.is_file() else None
        yield from _same(step.id, f"evaluation.texts.{name}", stated.get(f"text/{name}"), found)


def _same(where: str, what: str, expected: Scalar, found: Scalar) -> Iterator[Finding]:
    if expected != found:
        yield Finding("changed", where, what, expected, found)


def _settings_digest(step: Step) -> str | None:
    """The digest of a step's frozen settings, as its manifest has it."""
    if not step.params.is_file():
        return None
    if step.id == BASE:
        return digest_of_value(yaml.safe_load(step.params.read_text(encoding="utf-8")))
    return digest_of(step.params)


def _measured_again(
    project: Project, ledger: Ledger, report: dict[str, Any], exact: bool, tolerance: float, progress: Progress
) -> Iterator[Finding]:
    """Fill the report with fresh numbers, verdicts and curves."""
    step = project.step(ledger.newest)
    settings = load_settings(step.params)
    recorded = read_json(step.evaluation)
    if step.id == BASE:
        fresh = measure_base(project, settings, Runtime(settings.run), progress).numbers()
        report["missing"] |= dict.fromkeys(("gates", "attacks"), "no request is accepted: nothing had to be forgotten")
    else:
        plan = _plan(project, ledger, settings, exact)
        fresh, _ = measure_step(project, plan, progress=progress)
        _attest(plan, recorded, fresh, report)
    report["evaluation"] = fresh
    yield from _compared(step.id, recorded, fresh, tolerance, report)
    if step.id != BASE:
        requests = tuple(ledger.accepted)
        report["attacks"] = attack_stored(project, step, requests, settings, progress=progress)
        lost = [name for name in settings.attacks if report["attacks"]["missing"].get(name) == ATTESTED]
        report["missing"] |= dict.fromkeys(lost, ATTESTED)
        curves = {name: curve for name, curve in read_json(step.attacks).items() if name in lost} if lost else {}
        report["gates"], failed = judge(
            project, plan, evaluation=fresh, attacks={**report["attacks"], **curves},
            reached=bool(read_json(step.unlearning)["reached"]),
        )  # fmt: skip
        for gate in (line.split(":", 1)[0] for line in failed):
            yield from _failed_checks(step.id, gate, report["gates"][gate])


def _attest(plan: Plan, recorded: Mapping[str, Any], fresh: dict[str, Any], report: dict[str, Any]) -> None:
    """Of erased records there are the recorded numbers alone: the gates judge by them, and the report says so."""
    sets = [name for name in map(plan.set_of, plan.attested) if name in recorded["sets"]]
    fresh["sets"] |= {name: recorded["sets"][name] for name in sets}
    lost = set(recorded["model"]) - set(fresh["model"]) if plan.request in plan.attested else set()
    fresh["model"] |= {name: recorded["model"][name] for name in sorted(lost)}
    report["missing"] |= dict.fromkeys([*sets, *(f"model.{name}" for name in sorted(lost))], ATTESTED)


def _plan(project: Project, ledger: Ledger, settings: Settings, exact: bool) -> Plan:
    """The champion's step as it was planned; :func:`_chain` has looked at the digests."""
    if exact:
        whole = settings.evaluation.model_copy(update={"earlier_records": None})
        settings = settings.model_copy(update={"evaluation": whole})
    *earlier, request = ledger.accepted
    previous = earlier[-1] if earlier else BASE
    inputs = (read_manifest(project.step(request)) or {"inputs": {}})["inputs"]
    erased = erased_requests(project, ledger.accepted)
    return Plan(request, previous, tuple(earlier), settings, inputs, limits_of(project, settings), erased)


def _failed_checks(where: str, gate: str, verdict: Mapping[str, Any]) -> Iterator[Finding]:
    failed = [check for check in verdict["checks"] if not check["passed"]]
    for check in failed:
        yield Finding("returned", where, f"{gate}: {check['what']}", check["limit"], check["value"])
    if not failed:
        yield Finding("returned", where, gate)


def _compared(
    where: str, recorded: Mapping[str, Any], fresh: Mapping[str, Any], tolerance: float, report: dict[str, Any]
) -> Iterator[Finding]:
    """Each number of the two evaluations that differs, or stands in one of them only."""
    sizes = [{name: sample["records"] for name, sample in one.get("sampled", {}).items()} for one in (recorded, fresh)]
    resampled = {name for one in sizes for name in one if sizes[0].get(name) != sizes[1].get(name)}
    before, now = dict(_numbers(recorded)), dict(_numbers(fresh))
    for name in sorted({*before, *now}):
        if ATTESTED in (report["missing"].get(name[0]), report["missing"].get(".".join(name))):
            continue
        if name[0] in resampled:
            report["missing"][f"comparison of {name[0]}"] = "recorded on a sample, measured on all records now"
            continue
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            yield Finding("differs", where, ".".join(name), old, new)
            continue
        report["compared"] += 1
        difference = abs(old - new)
        report["largest_difference"] = max(report["largest_difference"], difference)
        if not difference <= tolerance:
            yield Finding("differs", where, ".".join(name), old, new)


def _numbers(evaluation: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float]]:
    """(set or ``model``, metric) -> value; record numbers are none."""
    for name, row in {**evaluation["sets"], "model": evaluation["model"]}.items():
        for metric, value in row.items():
            if isinstance(value, int | float) and math.isfinite(value):
                yield (name, metric), float(value)
