"""Reference models: trained without some requests' records, they are what honest forgetting looks like.

A reference lies in ``reference/<digest>/``. The digest is that of all that decides it (settings, splits, the records
left out, seed), so the same question finds the same model again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import nn

from alkn.base import train_new, trained_on
from alkn.core.attack import numbers_of
from alkn.core.scoring import Example, Progress, no_progress, score
from alkn.core.truth_ratio import TruthRatios, truth_ratios
from alkn.core.unlearning import Forgetting, seed_of
from alkn.encoding import Encoder
from alkn.errors import AlknError, ChainBroken, InputError
from alkn.files import digest_of, digest_of_value, read_json, read_jsonl, remove, write_via
from alkn.manifest import check_step, outputs_hold, read_manifest, write_manifest
from alkn.models import check_model_folder, load_model, load_tokenizer, save_model
from alkn.project import Project, Step
from alkn.record_sets import Records, by_domain, known_records, load_split
from alkn.runtime import Runtime
from alkn.settings import Settings

logger = logging.getLogger(__name__)

SLACK = 0.005
"""How far below the base model's P a reference may end on a retain domain."""
LONGER = (1.0, 1.5, 2.25)
"""Lengths that are tried until the level is reached, in optimizer steps of the base model's training."""


@dataclass(frozen=True)
class Reference:
    """A reference model on disk, checked against its manifest.

    Attributes:
        folder: ``reference/<digest>``.
        digest: of the model folder; every number measured against it names this.
        manifest: the manifest's content.
        cached: whether it was there already.
    """

    folder: Path
    digest: str
    manifest: Mapping[str, Any]
    cached: bool

    @property
    def model(self) -> Path:
        """Its transformers folder."""
        return Step(self.folder).model


@dataclass(frozen=True)
class ReferencePlan:
    """A reference before it is made.

    Attributes:
        step: where it lies.
        inputs: name -> digest of all that decides it.
        encoder: the base model's.
        examples: all that the base model was trained on.
        gone: positions in ``examples`` that the reference never sees.
    """

    step: Step
    inputs: Mapping[str, str]
    encoder: Encoder
    examples: Sequence[Example]
    gone: frozenset[int]


def plan_reference(project: Project, settings: Settings, *, without: Sequence[str], seed: int = 0) -> ReferencePlan:
    """What a reference is made from and where it lies; arguments and errors as of :func:`make_reference`."""
    base = check_step(project.base)
    if "parameters" not in base:
        raise InputError(
            "the base model was not trained here, so nobody knows what it was trained on; 'alkn reference --path DIR'"
            " takes a reference model of your own"
        )
    encoder = Encoder.of(project.base.model, settings)
    examples, gone = _left_out(project, encoder, without)
    inputs = {
        "settings": digest_of_value({key: settings.of_base()[key] for key in ("data", "base", "run")}),
        "splits": digest_of(project.splits),
        "base": base["outputs"]["model"],
        "without": digest_of_value(sorted(gone)),
        "seed": str(seed),
    }
    return ReferencePlan(_place(project, digest_of_value(inputs)), inputs, encoder, examples, frozenset(gone))


def make_reference(
    project: Project, settings: Settings, *, without: Sequence[str], seed: int = 0, progress: Progress = no_progress
) -> Reference:
    """Train a model as the base model was, without the records of some requests, or find it done.

    It has the base model's tokenizer, its own first weights and its own order of batches. It is trained for as many
    optimizer steps as the base model, and longer if it does not know the retain records as well as that one does.

    Args:
        project: whose base model was trained here.
        settings: with which the base model was made.
        without: request ids, from ``data/requests`` or the benchmark.
        seed: two seeds give the spread that honest references have among themselves.
        progress: told about every training step.

    Raises:
        InputError: if the base model was not trained here, or a request holds nothing that it was trained on.
        ChainBroken: if the base model, or a reference that is there, is not what its manifest says.
        AlknError: if the base model's level on the retain records is not reached.
    """
    plan = plan_reference(project, settings, without=without, seed=seed)
    project.private.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Held through the training: of several processes that ask for one reference, the others wait and find it.
    with FileLock(project.private / "reference.lock"):
        step = plan.step
        known = _known(step, plan.inputs)
        if known is not None:
            return known
        started = time.monotonic()
        facts = _train(project, settings, plan, seed=seed, progress=progress)
        model = load_model(step.model, device=Runtime(settings.run).device)
        facts["forgotten"] = {
            name: numbers_of(Forgetting.of(score(model, plan.encoder.examples(name, request_records(project, name)))))
            for name in without
        }
        facts |= {"without": list(without), "left_out": len(plan.gone), "records": len(plan.examples) - len(plan.gone)}
        facts["seconds"] = {"total": round(time.monotonic() - started, 1)}
        manifest = write_manifest(step, inputs=plan.inputs, outputs=(step.model,), seed=seed, facts=facts)
        return Reference(step.folder, manifest["outputs"]["model"], manifest, cached=False)


def adopt_reference(project: Project, path: Path) -> Reference:
    """Take a model folder of the user's as a reference: it stays where it is, the project holds a link and its digest.

    Raises:
        InputError: if the folder is no model.
        ChainBroken: if a folder that was taken with this digest has changed since.
    """
    check_model_folder(path)
    target = path.expanduser().resolve()
    inputs = {"model": digest_of(target)}
    step = _place(project, inputs["model"])
    known = _known(step, inputs)
    if known is not None:
        return known
    step.folder.mkdir(parents=True, exist_ok=True)
    remove(step.model)
    step.model.symlink_to(target, target_is_directory=True)
    manifest = write_manifest(step, inputs=inputs, outputs=(step.model,), seed=0, facts={"without": None})
    return Reference(step.folder, manifest["outputs"]["model"], manifest, cached=False)


def open_reference(project: Project, name: str) -> Reference:
    """The reference model in ``reference/<name>``, checked against its manifest.

    Raises:
        InputError: if there is none.
        ChainBroken: if its model is not the one that its manifest holds.
    """
    step = Step(project.root / "reference" / name)
    manifest = read_manifest(step)
    if manifest is None:
        raise InputError(
            f"evaluation.references: there is no reference model reference/{name}; 'alkn reference' makes one and"
            " says its name"
        )
    return _opened(step, manifest)


def reference_ratios(
    reference: Reference, records: Mapping[str, Records], settings: Settings
) -> dict[str, TruthRatios]:
    """Truth ratios of each request's records under a reference, read with its own tokenizer.

    Args:
        reference: from :func:`make_reference` or :func:`adopt_reference`.
        records: request id -> its records, see :func:`request_records`.
        settings: templates, device.
    """
    encoder = Encoder.of(reference.model, settings)
    remote = settings.base.trust_remote_code
    model = load_model(reference.model, device=Runtime(settings.run).device, trust_remote_code=remote)
    return {name: truth_ratios(model, encoder.record_set(name, rows)) for name, rows in records.items()}


def request_records(project: Project, request_id: str) -> Records:
    """A request's records: from ``data/requests``, else from the benchmark's own.

    Raises:
        InputError: if there are none.
    """
    path = project.request(request_id)
    if path.is_file():
        return read_jsonl(path)
    known = known_records(project)
    if request_id not in known:
        raise InputError(f"request {request_id!r} has no records: neither data/requests nor the benchmark holds it")
    return known[request_id]


def _left_out(project: Project, encoder: Encoder, without: Iterable[str]) -> tuple[list[Example], set[int]]:
    """All that the base model was trained on, and the positions of what reads, token for token, like the requests'."""
    examples = [example for name, rows in trained_on(project).items() for example in encoder.examples(name, rows)]
    places: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        places.setdefault(tuple(example.tokens.tolist()), []).append(i)
    numbers: set[int] = set()
    for name in without:
        asked = encoder.examples(name, request_records(project, name))
        found = [i for example in asked for i in places.get(tuple(example.tokens.tolist()), ())]
        if not found:
            raise InputError(f"request {name!r} holds no record that the base model was trained on")
        numbers.update(found)
    if not numbers:
        raise InputError("a reference is trained without at least one request, and none was named")
    return examples, numbers


def _train(
    project: Project,
    settings: Settings,
    plan: ReferencePlan,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    runtime, batch_size = Runtime(settings.run), settings.base.training.batch_size
    kept = [example for i, example in enumerate(plan.examples) if i not in plan.gone]
    tokenizer = load_tokenizer(project.base.model)
    wanted = _base_level(project)
    unseen = {tuple(plan.examples[i].tokens.tolist()) for i in plan.gone}
    sets = {
        name: [example for example in plan.encoder.examples(name, rows) if tuple(example.tokens.tolist()) not in unseen]
        for name, rows in by_domain(load_split(project, "retain")).items()
    }
    steps = settings.base.training.epochs * math.ceil(len(plan.examples) / batch_size)
    level: dict[str, float] = {}
    for longer in LONGER:
        epochs = math.ceil(longer * steps / math.ceil(len(kept) / batch_size))
        model = train_new(
            tokenizer,
            kept,
            settings,
            runtime,
            weights_seed=seed_of(seed, "reference", "weights"),
            order_seed=seed_of(seed, "reference", "order"),
            epochs=epochs,
            progress=progress,
            label="train reference",
        )
        level = _level(model, sets)
        if all(level[name] >= wanted[name] - SLACK for name in level):
            write_via(plan.step.model, partial(save_model, model.cpu(), tokenizer))
            return {"epochs": epochs, "retain": level, "base_retain": wanted}
        logger.info("a reference trained for %d epochs is below the base model's level; training longer", epochs)
    worst = min(level, key=lambda name: level[name] - wanted[name])
    raise AlknError(
        f"the reference has P {level[worst]:.3f} on retain/{worst}, and the base model {wanted[worst]:.3f}:"
        f" {LONGER[-1]:g} times the base model's training did not bring it to that level"
    )


def _base_level(project: Project) -> dict[str, float]:
    sets = read_json(project.base.evaluation)["sets"]
    return {name.split("/", 1)[1]: row["probability"] for name, row in sets.items() if name.startswith("retain/")}


def _level(model: nn.Module, sets: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    return {name: float(score(model, examples).probability.mean()) for name, examples in sets.items() if examples}


def _place(project: Project, digest: str) -> Step:
    return Step(project.root / "reference" / digest.removeprefix("sha256:")[:16])


def _known(step: Step, inputs: Mapping[str, str]) -> Reference | None:
    """The reference that lies there.

    Raises:
        ChainBroken: if its model is not the one that its manifest holds.
    """
    manifest = read_manifest(step)
    return None if manifest is None or manifest["inputs"] != dict(inputs) else _opened(step, manifest)


def _opened(step: Step, manifest: Mapping[str, Any]) -> Reference:
    if not outputs_hold(step, manifest):
        raise ChainBroken(
            f"reference/{step.id}/model is missing or was changed after it was made; remove reference/{step.id} to have"
            " it made again"
        )
    return Reference(step.folder, manifest["outputs"]["model"], manifest, cached=True)
