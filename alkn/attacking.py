"""Attacks on one model, as plain numbers: as part of a step, and of the report on a chain's last model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from alkn import registry
from alkn.core.attack import Curve, Target
from alkn.core.distributed import is_main, wait, whole_batches
from alkn.core.scoring import Example, Progress, no_progress
from alkn.core.sharding import split_
from alkn.encoding import Encoder
from alkn.errors import AlknError, InputError
from alkn.files import read_jsonl, write_json
from alkn.models import load_model
from alkn.project import Project, Step
from alkn.record_sets import SPLITS, Records, by_domain, load_split
from alkn.records import Plan
from alkn.registry import Params
from alkn.requests.ledger import ATTESTED, erased_requests
from alkn.requests.schema import read_records
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
        See :func:`run_attacks`; every attack that is not asked for stands under ``missing`` as switched off, and
        ``on <id>`` for each request whose records were erased.
    """
    off = {name: OFF for name in registry.attacks if name not in settings.attacks}
    erased = erased_requests(project, requests)
    asked = [name for name in requests if name not in erased]
    off |= {f"on {name}": ATTESTED for name in erased}
    if not settings.attacks or not asked:
        return {"missing": off | dict.fromkeys(settings.attacks, ATTESTED)}
    runtime, remote = Runtime(settings.run), settings.base.trust_remote_code
    encoder = Encoder.of(step.model, settings)
    model = load_model(step.model, device=runtime.device, trust_remote_code=remote)
    if runtime.split:
        split_(model, device=runtime.device)
    records = {name: read_jsonl(project.request(name)) for name in asked}
    target = target_of(project, model, encoder, records, settings, name=step.id, progress=progress)
    report = run_attacks(target, settings.attacks)
    return {**report, "missing": {**report["missing"], **off}}


def target_of(
    project: Project,
    model: nn.Module,
    encoder: Encoder,
    records: Mapping[str, Records],
    settings: Settings,
    *,
    name: str,
    progress: Progress = no_progress,
) -> Target:
    """What attacks are given, from a project's files.

    Args:
        project: whose splits are read; paths in the settings are relative to its folder.
        model: on its device, at the precision it is stored in.
        encoder: of the model.
        records: request -> its records.
        settings: device, and whether a folder's own code may run.
        name: stands for ``{request}`` in the folder of an export.
        progress: told about the attacks' steps.
    """

    def load(folder: str) -> tuple[nn.Module, int]:
        folder = folder.replace("{request}", name)
        path = project.root / Path(folder).expanduser()
        device = next(model.parameters()).device
        with _named(path, folder):
            exported: Any = load_model(path, device=device, trust_remote_code=settings.base.trust_remote_code)
        return exported, weight_bits(exported)

    return Target(
        model,
        {request: encoder.examples(request, rows) for request, rows in records.items()},
        {domain: encoder.examples(domain, rows) for domain, rows in by_domain(load_split(project, "utility")).items()},
        progress,
        asked={request: encoder.asked(rows) for request, rows in records.items()},
        related=lambda text: _related(project, encoder, text),
        load=load,
        decode=encoder.decode,
        eos=encoder.tokenizer.eos_token_id,
    )


def weight_bits(model: Any) -> int:
    """Bits of a weight: what the folder's quantisation says, else those of the first weight's type."""
    said: Any = getattr(model.config, "quantization_config", None) or {}
    values = said.to_dict() if hasattr(said, "to_dict") else dict(said)
    for key, bits in (("bits", values.get("bits")), ("load_in_4bit", 4), ("load_in_8bit", 8)):
        if values.get(key) and bits:
            return int(bits)
    first: Tensor = next(model.parameters())
    return 8 * first.element_size()


def _related(project: Project, encoder: Encoder, text: str) -> Sequence[Example]:
    """A split of the project, or a user's file of records or of plain text."""
    if text in SPLITS:
        return encoder.examples(text, load_split(project, text))
    path = project.root / Path(text).expanduser()
    with _named(path, text):
        return encoder.examples("related text", read_records(path))


@contextmanager
def _named(path: Path, given: str) -> Iterator[None]:
    """What goes wrong with a path is told by its name in the settings: a report holds no place of a machine."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(str(path), given)) from None
    except (ImportError, ValueError, RuntimeError) as error:  # of a quantised form that is not installed here
        raise InputError(f"{given}: cannot be loaded ({type(error).__name__})") from None


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
