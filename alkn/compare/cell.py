"""One cell of a comparison: a whole chain with one method and one seed, in a project folder of its own.

The chain is made by the functions that ``alkn run`` uses, without DVC, and it goes on whatever the gates
say: a method that wrecks the model, or does not reach the target, is compared like any other. Sealed steps
decide what is left to do, so a cell that was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from alkn import chain
from alkn.attacking import attack_step
from alkn.compare.config import Cell, Comparison, chosen_domain
from alkn.compare.final import make_references, measure_final
from alkn.compare.made import Made, settings_of_ground
from alkn.core.scoring import Progress
from alkn.encoding import Encoder
from alkn.errors import ChainBroken, InputError, TrainingDiverged
from alkn.evaluation import evaluate_model
from alkn.files import digest_of, digest_of_value, read_json, remove, write_json, write_yaml
from alkn.manifest import code_version, outputs_hold, read_manifest
from alkn.models import load_model
from alkn.planning import plan_step
from alkn.project import Project, Step
from alkn.record_sets import by_domain, earlier_records, load_split
from alkn.records import Plan
from alkn.requests.ledger import BASE, Ledger, save_ledger
from alkn.runtime import Runtime
from alkn.settings import Evaluation, Settings, load_settings
from alkn.step import evaluate_step, gate_step, unlearn_step

Tell = Callable[[str, str, int, int], None]
"""Told about progress: the request (or ``base``, ``final``), what is done to it, how far, of how many."""

AHEAD = Evaluation(metrics=("probability", "exact_memorization"), generate=())
LOCK_TIMEOUT_S = 60
"""A worker whose parent was killed ends by itself; the next one waits so long for its lock."""


def ground_of(folder: Path, seed: int) -> Project:
    """The project that holds a seed's splits and base model, shared by the seed's cells."""
    return Project(folder.resolve() / "base" / f"seed{seed}")


def project_of(folder: Path, cell: Cell) -> Project:
    """The project of a cell."""
    return Project(folder.resolve() / "cells" / cell.folder)


def state_file(folder: Path, cell: Cell) -> Path:
    """What a cell says of itself once it is over: written last."""
    return project_of(folder, cell).root / ("trial.json" if cell.trial else "cell.json")


def requests_of(ground: Project) -> list[str]:
    """The benchmark's requests in order; numbers in their names count as numbers."""

    def natural(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]

    return sorted((path.stem for path in (ground.splits / "forget").glob("*.jsonl")), key=natural)


def chain_of(comparison: Comparison, cell: Cell, requests: list[str]) -> list[str]:
    """The requests of a cell: all of the benchmark's, or those of a trial."""
    return requests[: comparison.sweep_requests] if cell.trial else requests


def make_ground(folder: Path, comparison: Comparison, seed: int, tell: Tell) -> None:
    """Make a seed's splits, base model and references where they are missing or belong to other settings.

    Raises:
        AlknError: if the base model does not know what it was trained on.
        InputError: if the benchmark has no requests.
    """
    ground, settings = ground_of(folder, seed), comparison.ground_settings(seed)
    with _locked(ground):
        if not ground.ledger.is_file():
            save_ledger(ground, Ledger())
        chain.prepare_data(ground, settings)
        if not requests_of(ground):
            raise InputError(f"benchmark {getattr(settings.benchmark, 'name', '')!r} has no requests to compare on")
        # Refused before hours of work.
        chosen_domain(comparison.choose_by, list(by_domain(load_split(ground, "utility"))))
        chain.prepare_base(ground, settings, progress=_telling(tell, BASE))
        make_references(ground, settings, comparison, requests_of(ground), _telling(tell, BASE))


def ground_is_made(folder: Path, comparison: Comparison, seed: int) -> bool:
    """Whether a seed's splits and base model are there and belong to these settings."""
    ground, settings = ground_of(folder, seed), comparison.ground_settings(seed)
    return belongs(ground, settings) and outputs_hold(ground.base, _base_manifest(ground))


def belongs(ground: Project, settings: Settings) -> bool:
    """Whether a seed's splits and base model were made, and with these settings."""
    if read_manifest(ground.base) is None or not ground.base.params.is_file() or not ground.data_params.is_file():
        return False
    made = load_settings(ground.data_params).of_data() | load_settings(ground.base.params).of_base()
    wanted = settings_of_ground(settings)
    return {name: made[name] for name in wanted} == wanted


def run_cell(folder: Path, comparison: Comparison, cell: Cell, tell: Tell) -> Mapping[str, Any]:
    """Make what is missing of a cell.

    Returns:
        The content of its ``cell.json``: ``state`` is ``done``, or ``diverged`` with the reason.

    Raises:
        AlknError: if something else than the method's own arithmetic went wrong.
    """
    project, settings = project_of(folder, cell), comparison.cell_settings(cell)
    ground = ground_of(folder, cell.seed)
    with _locked(project):
        every, key, path = requests_of(ground), key_of(ground, settings), state_file(folder, cell)
        requests = chain_of(comparison, cell, every)
        known, made = _known_state(path, project, requests, key), False
        if known is None:
            remove(path)
            _link_ground(folder, project, ground, settings)
            known, made = _chain(project, settings, requests, every, tell), True
        if known["state"] == "done" and not cell.trial:
            made |= measure_final(project, ground, settings, comparison, requests, _telling(tell, "final"))
        state = {"key": key, **known}
        if made:
            state["made"] = dataclasses.asdict(Made.here())
        write_json(path, state)
        # A trial's are needed by the whole cell, should it be chosen.
        if known["state"] == "done" and comparison.keep == "last" and not cell.trial:
            _forget_models(project, requests[:-1])
        return state


def key_of(ground: Project, settings: Settings) -> str:
    """What a cell rests on: settings of its steps, base model, data, chain. Another key: another cell.

    Raises:
        ChainBroken: if the base model is not made yet.
    """
    return digest_of_value(
        {
            "settings": settings.of_step(), "ground": settings_of_ground(settings),
            "base": _base_manifest(ground)["outputs"], "data": splits_of(ground), "requests": requests_of(ground),
        }
    )  # fmt: skip


def splits_of(ground: Project) -> str:
    """A digest of a seed's data.

    Raises:
        ChainBroken: if the base model is not made yet.
    """
    return str(_base_manifest(ground)["inputs"].get("splits"))


def _base_manifest(ground: Project) -> Mapping[str, Any]:
    base = read_manifest(ground.base)
    if base is None:
        raise ChainBroken(f"{ground.root.name}: the base model of this seed is not there")
    return base


def _known_state(path: Path, project: Project, requests: list[str], key: str) -> dict[str, Any] | None:
    """How the cell ended, if it did with these settings; a divergence is tried again by other code only."""
    if not path.is_file():
        return None
    state = dict(read_json(path))
    if state["requests"] != requests or state.pop("key") != key:
        return None
    if outdated(state):
        return None
    for request in state["requests"][: state["steps"]]:
        step = project.step(request)
        manifest = read_manifest(step)
        if manifest is None or not all(
            (step.folder / name).is_file() and digest_of(step.folder / name) == manifest["outputs"][name]
            for name in ("unlearning.json", "evaluation.json", "gate.json")
        ):
            return None
    return state


def outdated(state: Mapping[str, Any]) -> bool:
    """Whether a cell diverged with other code than there is now: it is tried again."""
    return "code" in state and state["code"] != code_version()["digest"]


def _link_ground(folder: Path, project: Project, ground: Project, settings: Settings) -> None:
    """Splits, requests, base model and key are the seed's; the cell links them, so that the folder can be moved."""
    links = {
        project.splits: ground.splits,
        project.root / "data" / "requests": ground.splits / "forget",
        project.base.folder: ground.base.folder,
        project.private / "key": Project(folder.resolve()).private / "key",
    }
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        remove(link)
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=target.is_dir())
    write_yaml(project.params, settings.model_dump(mode="json"))


def _chain(project: Project, settings: Settings, requests: list[str], every: list[str], tell: Tell) -> dict[str, Any]:
    """``requests``, the first of ``every``, in order, each from the model that the one before left."""
    previous, limits = BASE, None
    for number, request in enumerate(requests):
        write_yaml(project.step(request).params, settings.of_step())
        plan = plan_step(project, request, previous=previous, earlier=tuple(requests[:number]), settings=settings)
        limits = {"p": plan.limits.p, "exact_memorization": plan.limits.exact_memorization}
        try:
            _step(project, plan, every[number + 1 :], _telling(tell, request))
        except TrainingDiverged as error:
            return {
                "state": "diverged", "reason": f"{request}: {error}", "requests": requests, "steps": number,
                "limits": limits, "code": code_version()["digest"],
            }  # fmt: skip
        previous = request
    return {"state": "done", "requests": requests, "steps": len(requests), "limits": limits}


def _step(project: Project, plan: Plan, ahead: list[str], progress: Progress) -> None:
    """One request, unless its step is sealed with the same inputs."""
    step = project.step(plan.request)
    manifest = read_manifest(step)
    if manifest is not None and manifest["inputs"] == dict(plan.inputs) and outputs_hold(step, manifest):
        return
    remove(step.manifest)
    unlearned = unlearn_step(project, plan, progress=progress)
    seconds = _unlearning_seconds(step, unlearned.seconds)
    started = time.monotonic()
    evaluate_step(project, plan, progress=progress)
    _measure_ahead(project, plan, ahead, progress)
    attack_step(project, plan, progress=progress)
    seconds["evaluate"] = time.monotonic() - started
    gate_step(project, plan, unlearned, seconds=seconds)


def _unlearning_seconds(step: Step, seconds: float) -> dict[str, float]:
    """How long the unlearning took, also where an earlier process did it; empty if nobody wrote it down."""
    path, report = step.folder / "seconds.json", digest_of(step.unlearning)
    if seconds > 0:
        write_json(path, {"unlearning": report, "seconds": seconds})
    elif not path.is_file() or read_json(path)["unlearning"] != report:
        return {}
    return {"unlearn": float(read_json(path)["seconds"])}


def _measure_ahead(project: Project, plan: Plan, ahead: list[str], progress: Progress) -> None:
    """P of the requests still to come, under the step's model: what a step takes away unasked.

    On as many of their records as of those that came before.
    """
    step = project.step(plan.request)
    path, remote = step.model, plan.settings.base.trust_remote_code
    encoder = Encoder.of(path, plan.settings)
    model = load_model(path, device=Runtime(plan.settings.run).device, trust_remote_code=remote)
    size = plan.settings.evaluation.earlier_records
    sets = [encoder.record_set(name, earlier_records(project, name, size).records) for name in ahead]
    metrics = evaluate_model(model, sets, encoder, AHEAD, eos=encoder.tokenizer.eos_token_id, progress=progress)
    write_json(ahead_file(step), metrics["sets"])


def ahead_file(step: Step) -> Path:
    """P and exact memorization of the requests still to come."""
    return step.folder / "ahead.json"


def _forget_models(project: Project, requests: list[str]) -> None:
    """Remove models and vectors of all steps but the last; their numbers and digests stay."""
    for request in requests:
        step = project.step(request)
        for path in (step.model, step.task_vector, step.state):
            remove(path)


def _locked(project: Project) -> FileLock:
    project.private.mkdir(mode=0o700, parents=True, exist_ok=True)
    return FileLock(project.private / "cell.lock", timeout=LOCK_TIMEOUT_S)


def _telling(tell: Tell, request: str) -> Progress:
    def progress(what: str, done: int, total: int) -> None:
        tell(request, what, done, total)

    return progress
