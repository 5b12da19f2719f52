"""Attacks on one model, as plain numbers: as part of a step, and of the report on a chain's last model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alkn import registry
from alkn.core.attack import Curve, Target
from alkn.core.distributed import is_main, wait, whole_batches
from alkn.core.scoring import Progress, no_progress
from alkn.core.sharding import split_
from alkn.encoding import Encoder
from alkn.errors import AlknError
from alkn.files import read_jsonl, write_json
from alkn.models import context_length, load_model, load_tokenizer
from alkn.project import Project, Step
from alkn.record_sets import by_domain, load_split
from alkn.records import Plan
from alkn.registry import Params
from alkn.runtime import Runtime
from alkn.settings import Settings

OFF = "switched off in the settings"


def attack_step(project: Project, plan: Plan, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Attack the candidate, read back from disk, over this request and all earlier ones; write attacks.json."""
    requests = (*plan.earlier, plan.request)
    report = attack_stored(project, project.step(plan.request), requests, plan.settings, progress=progress)
    if is_main():
        write_json(project.step(plan.request).attacks, report)
    wait()
    return report


def attack_stored(
    project: Project,
    step: Step,
    requests: tuple[str, ...],
    settings: Settings,
    *,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """What the attacks of the settings bring back from a step's model.

    Args:
        project: whose requests and splits are read.
        step: whose model is attacked.
        requests: whose records it should not know, in the chain's order.
        settings: attacks with their budgets, and where the arithmetic runs.
        progress: told about the attacks' steps.

    Returns:
        See :func:`run_attacks`; every attack that is not asked for stands under ``missing`` as switched off.
    """
    off = {name: OFF for name in registry.attacks if name not in settings.attacks}
    if not settings.attacks:
        return {"missing": off}
    runtime, remote = Runtime(settings.run), settings.base.trust_remote_code
    tokenizer = load_tokenizer(step.model, trust_remote_code=remote)
    encoder = Encoder(tokenizer, settings.data, context=context_length(step.model, trust_remote_code=remote))
    model = load_model(step.model, device=runtime.device, trust_remote_code=remote)
    if runtime.split:
        split_(model, device=runtime.device)
    target = Target(
        model,
        {name: encoder.examples(name, read_jsonl(project.request(name))) for name in requests},
        {name: encoder.examples(name, rows) for name, rows in by_domain(load_split(project, "utility")).items()},
        progress,
    )
    report = run_attacks(target, settings.attacks)
    return {**report, "missing": {**report["missing"], **off}}


def run_attacks(target: Target, attacks: Mapping[str, Params]) -> dict[str, Any]:
    """Each attack's curve; the model is unchanged afterwards.

    Args:
        target: what is attacked.
        attacks: registered attack -> its parameters.

    Returns:
        Attack -> :meth:`alkn.core.attack.Curve.as_dict`, and ``missing``: attack -> why it has no curve.
    """
    report: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, params in attacks.items():
        try:
            # Of several processes each does the whole of what trains: the budgets are small.
            with whole_batches():
                curve: Curve = registry.attacks[name].call(target, params)
            report[name] = _finite(curve.as_dict())
        except AlknError as error:
            missing[name] = str(error)
    return {**report, "missing": missing}


def _finite(curve: dict[str, Any]) -> dict[str, Any]:
    """The curve itself.

    Raises:
        AlknError: if a number of it is not finite: nothing could be judged by it.
    """
    for point in curve["points"]:
        rows = [point, *point["requests"].values(), point.get("utility", {})]
        if not all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, int | float)):
            raise AlknError(f"a number at {point['at']} {curve['unit']} is not finite")
    return curve
