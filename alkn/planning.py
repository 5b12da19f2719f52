"""What goes into a step before it is made, and whether the one that lies there is the one that would be made now."""

from __future__ import annotations

import logging

from alkn.core.unlearning import StopRule
from alkn.errors import ChainBroken, InputError
from alkn.files import digest_of, keyed_digest_of, read_json
from alkn.manifest import check_step, outputs_hold, read_manifest
from alkn.project import Project
from alkn.record_sets import splits_digest
from alkn.records import Plan, Sealed
from alkn.reference import open_reference
from alkn.requests.ledger import BASE, erased_requests, load_ledger
from alkn.settings import Level, Settings, load_settings
from alkn.texts import text_digests

logger = logging.getLogger(__name__)


def plan_step(
    project: Project, request_id: str, *, previous: str, earlier: tuple[str, ...], settings: Settings
) -> Plan:
    """Everything that goes into a step, checked against the manifests it builds on.

    Raises:
        ChainBroken: if the base model, the parent or an earlier request's file is not what its manifest says.
        InputError: if a target is the holdout's level and there is no holdout.
    """
    key, attested, base = project.key(), erased_requests(project, earlier), check_step(project.base)
    parent = check_step(project.step(previous)) if previous != BASE else base
    inputs = {
        "request": keyed_digest_of(project.request(request_id), key),
        "parent": parent["outputs"]["model"],
        "parent_evaluation": parent["outputs"]["evaluation.json"],
        "base": base["outputs"]["model"],
        "base_evaluation": base["outputs"]["evaluation.json"],
        "splits": splits_digest(project) or "none",
        "settings": digest_of(project.step(request_id).params),
    }
    if "state.safetensors" in parent["outputs"]:
        inputs["state"] = parent["outputs"]["state.safetensors"]
    for name in earlier:
        stated = (check_step(project.step(name)) if name != previous else parent)["inputs"]["request"]
        if name in attested:
            continue
        if keyed_digest_of(project.request(name), key) != stated:
            raise ChainBroken(f"data/requests/{name}.jsonl is not the file that steps/{name} was made from")
        inputs[f"earlier/{name}"] = stated
    inputs |= text_digests(project, settings.evaluation)
    inputs |= {f"reference/{name}": open_reference(project, name).digest for name in settings.evaluation.references}
    return Plan(request_id, previous, earlier, settings, inputs, limits_of(project, settings), attested)


def sealed_step(project: Project, request_id: str) -> Sealed | None:
    """A pending request's step that is done, and is what would be made now; else ``None``.

    Its manifest is there, its digests hold, and what goes in is what went in: the request's file as the ledger attests
    it, the newest accepted step, base model, splits, and the settings that are frozen beside it.

    Raises:
        ChainBroken: if what it builds on is not what its manifest says.
    """
    step, ledger = project.step(request_id), load_ledger(project)
    manifest = read_manifest(step)
    if manifest is None or "accepted" not in manifest or not outputs_hold(step, manifest):
        return None
    stated = manifest["inputs"]
    if ledger.entry(request_id).digest != stated["request"] or not project.request(request_id).is_file():
        return None
    if not step.params.is_file() or digest_of(step.params) != stated["settings"]:
        return None
    try:
        settings = load_settings(step.params)
    except InputError as error:
        logger.warning(
            "%s is made anew: the settings of the step that lies there cannot be read: %s", request_id, error
        )
        return None
    plan = plan_step(project, request_id, previous=ledger.newest, earlier=tuple(ledger.accepted), settings=settings)
    changed = sorted(name for name in {**stated, **plan.inputs} if stated.get(name) != plan.inputs.get(name))
    if changed:
        logger.warning("%s is made anew: the step that lies there rests on another %s", request_id, ", ".join(changed))
        return None
    return Sealed(request_id, manifest["accepted"], "; ".join(manifest["failed"]), manifest)


def limits_of(project: Project, settings: Settings) -> StopRule:
    """The targets as numbers.

    Raises:
        InputError: if one is the holdout's level and there is no holdout.
    """
    base = read_json(project.base.evaluation)

    def number(level: Level, metric: str) -> float:
        if level != "holdout":
            return float(level)
        if "holdout" not in base["sets"]:
            raise InputError("params.yaml: targets: 'holdout' is asked for, and the project has no holdout set")
        return float(base["sets"]["holdout"][metric])

    targets = settings.targets
    return StopRule(number(targets.p, "probability"), number(targets.exact_memorization, "exact_memorization"))
