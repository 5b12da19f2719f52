"""What is measured once a cell's chain is over: attacks on the last model, and how it compares with honest ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alkn import registry
from alkn.attacking import target_of
from alkn.compare.config import Comparison
from alkn.core.scoring import Progress, no_progress
from alkn.encoding import Encoder
from alkn.files import read_json, write_json
from alkn.final import final_report
from alkn.manifest import check_step
from alkn.models import load_model
from alkn.project import Project
from alkn.reference import Reference, make_reference, reference_ratios, request_records
from alkn.runtime import Runtime
from alkn.settings import Settings


def final_file(project: Project) -> Path:
    """The numbers of a cell's last model, with what they rest on."""
    return project.root / "final.json"


def wanted_of(comparison: Comparison) -> dict[str, Any]:
    """What is asked for, defaults included: the attacks with their budgets, and the seeds of the references."""
    attacks = {
        name: registry.attacks[name].params.model_validate(values).model_dump(mode="json")
        for name, values in comparison.attacks.items()
    }
    return {"attacks": attacks, "references": list(comparison.references)}


def make_references(
    ground: Project,
    settings: Settings,
    comparison: Comparison,
    requests: Sequence[str],
    progress: Progress = no_progress,
) -> list[Reference]:
    """The seed's reference models, made where they are missing; trained without any request of the chain."""
    return [
        make_reference(ground, settings, without=requests, seed=seed, progress=progress)
        for seed in comparison.references
    ]


def measure_final(
    project: Project, ground: Project, settings: Settings, comparison: Comparison, requests: list[str],
    progress: Progress,
) -> bool:  # fmt: skip
    """Write final.json, unless it belongs to this model and to what is asked for already.

    Args:
        project: a cell whose chain is over.
        ground: the seed's project, which holds the references.
        settings: of the cell's steps.
        comparison: says what is asked for.
        requests: the cell's chain.
        progress: told about every attack's steps.

    Returns:
        Whether anything was measured.
    """
    wanted = wanted_of(comparison)
    if not any(wanted.values()):
        return False
    last = project.step(requests[-1])
    inputs = {"model": check_step(last)["outputs"]["model"], **wanted}
    path = final_file(project)
    if path.is_file() and read_json(path)["inputs"] == inputs:
        return False
    runtime, remote = Runtime(settings.run), settings.base.trust_remote_code
    encoder = Encoder.of(last.model, settings)
    records = {name: request_records(project, name) for name in requests}
    made = make_references(ground, settings, comparison, requests, progress)
    model = load_model(last.model, device=runtime.device, trust_remote_code=remote)
    report = final_report(
        model,
        {name: encoder.record_set(name, rows) for name, rows in records.items()},
        {reference.digest: reference_ratios(reference, records, settings) for reference in made},
        attacks=comparison.attacks,
        target=target_of(project, model, encoder, records, settings, name=last.id, progress=progress),
    )
    write_json(path, {"inputs": inputs, **report})
    return True
