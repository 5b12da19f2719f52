"""The chain as a whole: what it rests on, what comes next, and with which settings each part was made.

The settings in force are frozen beside whatever is made with them (data/params.yaml,
steps/<id>/params.yaml, in git), so that a later change of params.yaml leaves an audit of earlier
steps alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from alkn.base import make_base
from alkn.core.distributed import is_main, wait
from alkn.core.scoring import Progress, no_progress
from alkn.errors import InputError
from alkn.estimate import check_disk
from alkn.files import write_yaml
from alkn.manifest import check_step, outputs_hold, read_manifest
from alkn.planning import plan_step
from alkn.project import Project
from alkn.record_sets import build_splits, splits_digest
from alkn.records import Plan
from alkn.requests.intake import check_stored
from alkn.requests.ledger import BASE, Ledger, load_ledger
from alkn.runtime import Runtime
from alkn.settings import Settings


def prepare_data(project: Project, settings: Settings) -> bool:
    """Build the benchmark's splits where they are missing or belong to other settings.

    Returns:
        Whether they were built.

    Raises:
        InputError: if the settings of the data changed under a chain that rests on them, or if a benchmark is
            named where the splits are the user's own files, or none where a benchmark made them.
    """
    frozen = _frozen(project.data_params)
    if settings.benchmark is None:
        if frozen is not None:
            raise InputError(
                f"params.yaml: benchmark: data/splits were made by {frozen['benchmark']['name']!r}, and none is named:"
                " restore it, or start a project of its own with 'alkn init'"
            )
        return False
    if project.splits.with_name(f"{project.splits.name}.dvc").is_file():
        raise InputError(
            "params.yaml: benchmark: data/splits are this project's own files, and a benchmark would replace them:"
            " remove the key, or start a project of its own with 'alkn init'"
        )
    if project.splits.is_dir() and frozen == settings.of_data():
        return False
    if frozen is not None and frozen != settings.of_data():
        _refuse_under_chain(project, "data/splits", "seed or benchmark")
    build_splits(project, settings)
    write_yaml(project.data_params, settings.of_data())
    return True


def prepare_base(project: Project, settings: Settings, *, progress: Progress = no_progress) -> bool:
    """Make the base model where it is missing or belongs to other settings.

    Settings of evaluation and run may change under a chain; the base model's own metrics stay as they were.

    Returns:
        Whether it was made.

    Raises:
        InputError: if its settings changed under a chain that rests on it.
        ChainBroken: if the model changed under a chain that rests on it.
    """
    frozen, wanted = _frozen(project.base.params), settings.of_base()
    changed = frozen is not None and any(frozen.get(key) != wanted[key] for key in ("seed", "data", "base"))
    manifest = read_manifest(project.base)
    if manifest is not None:
        changed = changed or manifest["inputs"].get("splits") != splits_digest(project)
    if frozen is not None and manifest is not None and not changed and outputs_hold(project.base, manifest):
        return False
    if changed:
        _refuse_under_chain(project, "steps/base", "seed, data, base or the splits")
    elif manifest is not None and load_ledger(project).accepted:
        check_step(project.base)  # says what differs: under a chain the base model is never silently made anew
    make_base(project, settings, progress=progress)
    write_yaml(project.base.params, wanted)
    return True


def begin_step(project: Project, request_id: str, settings: Settings) -> Plan:
    """Freeze the settings of a pending request's step and plan it on top of the newest accepted one.

    Raises:
        InputError: if the disk cannot hold the step.
    """
    check_disk(project)
    ledger = load_ledger(project)
    write_yaml(project.step(request_id).params, settings.of_step())
    return plan_step(project, request_id, previous=ledger.newest, earlier=tuple(ledger.accepted), settings=settings)


def begin_together(project: Project, request_id: str, settings: Settings) -> tuple[str, tuple[str, ...]]:
    """Begin the first pending request's step in all processes that were started together; the first one writes.

    Returns:
        The step it starts from, and all accepted ones before it, oldest first.

    Raises:
        InputError: if another request comes before it, its records are not in place, or the disk cannot hold the step.
    """
    ledger = load_ledger(project)
    first = next(iter(ledger.pending))
    if first != request_id:
        raise InputError(f"request {request_id!r}: {first!r} comes before it, and a step starts from the one before")
    entry = ledger.entry(request_id)
    if entry.digest is None:
        raise InputError(f"request {request_id!r}: its records are not in place yet; 'alkn run' makes this one")
    check_stored(project, request_id, entry)
    Runtime(settings.run)
    if is_main():
        begin_step(project, request_id, settings)
    wait()
    return ledger.newest, tuple(ledger.accepted)


def place_in_chain(ledger: Ledger, request_id: str) -> tuple[str, tuple[str, ...]]:
    """Of an accepted step: the step it starts from, and all accepted ones before it, oldest first.

    Raises:
        InputError: if the request is not accepted.
    """
    entry = ledger.accepted.get(request_id)
    if entry is None:
        ledger.entry(request_id)
        raise InputError(f"request {request_id!r} is {ledger.where(request_id)}: only accepted steps can be remade")
    return entry.previous or BASE, tuple(ledger.chain_before(request_id))


def _frozen(path: Path) -> dict[str, Any] | None:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None


def _refuse_under_chain(project: Project, what: str, settings: str) -> None:
    accepted = load_ledger(project).accepted
    if accepted:
        raise InputError(
            f"{what} no longer fits params.yaml ({settings} changed), and {len(accepted)} accepted steps rest on it:"
            " restore them, or start a project of its own with 'alkn init'"
        )
