"""Stage ``base``: the model before any request, trained from scratch or taken from the user's folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Generator, nn
from transformers import PreTrainedTokenizerBase

from alkn.core.probe import References
from alkn.core.scoring import Example, Progress, no_progress
from alkn.core.training import Hyperparameters, answer_loss, cosine, fine_tune, steps_of
from alkn.core.unlearning import seed_of
from alkn.encoding import Encoder
from alkn.errors import AlknError, InputError
from alkn.evaluation import Measurements, headline, measure_model
from alkn.files import digest_of_value, remove, write_json, write_via
from alkn.manifest import write_manifest
from alkn.models import (
    check_model_folder,
    load_model,
    new_model,
    save_model,
    train_tokenizer,
)
from alkn.project import Project
from alkn.record_sets import Records, by_domain, generic_text, known_records, load_split, splits_digest
from alkn.requests.schema import form_of
from alkn.runtime import Runtime
from alkn.settings import Data, Settings
from alkn.texts import text_digests, text_sets

logger = logging.getLogger(__name__)


def base_inputs(project: Project, settings: Settings) -> dict[str, str]:
    """Digests of what the base model is made from."""
    inputs = {"settings": digest_of_value(settings.of_base())}
    if (splits := splits_digest(project)) is not None:
        inputs["splits"] = splits
    return inputs | text_digests(project, settings.evaluation)


def make_base(project: Project, settings: Settings, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Make steps/base and return its manifest.

    Args:
        project: whose base model.
        settings: where it comes from, or how it is trained.
        progress: told about every training step.

    Raises:
        InputError: if the user's folder is no model.
        AlknError: if the trained model does not know what it was trained on.
    """
    base = project.base
    started = time.monotonic()
    runtime = Runtime(settings.run)
    if settings.base.model is None:
        trained = _train(project, settings, runtime, progress)
    else:
        _link(base.model, project.root / Path(settings.base.model).expanduser())
        trained = {}
    measured = measure_base(project, settings, runtime, progress)
    metrics = measured.numbers()
    _check_level(metrics, settings)
    write_json(base.evaluation, metrics)
    write_json(base.per_record, measured.per_record())
    write_json(base.metrics, headline(metrics))
    return write_manifest(
        base,
        inputs=base_inputs(project, settings),
        outputs=(base.model, base.evaluation, base.per_record, base.metrics),
        seed=settings.seed,
        facts={**trained, "seconds": {"total": round(time.monotonic() - started, 1)}},
    )


def _train(project: Project, settings: Settings, runtime: Runtime, progress: Progress) -> dict[str, Any]:
    retain, architecture = load_split(project, "retain"), settings.base.architecture
    if not retain:
        raise InputError("base.model: null: there is nothing to train a base model on; give a model or a benchmark")
    # The vocabulary is trained without the forget records: a vocabulary remembers names.
    texts = [text for record in retain for text in written(record, settings.data)] + generic_text(project)
    tokenizer = train_tokenizer(texts, vocab_size=architecture.vocab_size)
    encoder = Encoder(tokenizer, settings.data, context=architecture.context)
    examples: list[Example] = []
    for name, records in trained_on(project).items():
        examples += encoder.examples(name, records)
    model = train_new(
        tokenizer,
        examples,
        settings,
        runtime,
        weights_seed=settings.seed,
        order_seed=seed_of(settings.seed, "base"),
        epochs=settings.base.training.epochs,
        progress=progress,
        label="train base",
    )
    write_via(project.base.model, lambda path: save_model(model.cpu(), tokenizer, path))
    return {"records": len(examples), "parameters": sum(p.numel() for p in model.parameters())}


def trained_on(project: Project) -> dict[str, Records]:
    """The records that a base model is trained on here, by split and by request of the benchmark."""
    return {
        "retain": load_split(project, "retain"),
        "utility": load_split(project, "utility"),
        **known_records(project),
    }


def train_new(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    settings: Settings,
    runtime: Runtime,
    *,
    weights_seed: int,
    order_seed: int,
    epochs: int,
    progress: Progress = no_progress,
    label: str = "train",
) -> nn.Module:
    """A new model of ``base.architecture``, trained by ``base.training`` on ``examples`` for ``epochs`` passes.

    Args:
        tokenizer: of the examples.
        examples: encoded records.
        settings: architecture and schedule.
        runtime: where the arithmetic runs.
        weights_seed: of the first weights.
        order_seed: of the batches.
        epochs: passes over the examples; the learning rate falls over all of them.
        progress: told about every step.
        label: what the progress shows.

    Raises:
        TrainingDiverged: when a loss is not finite.
    """
    plan = settings.base.training
    hp = Hyperparameters(
        lr=plan.lr, epochs=epochs, batch_size=plan.batch_size, weight_decay=plan.weight_decay,
        betas=(0.9, 0.95), clip=1.0,
    )  # fmt: skip
    model: nn.Module = new_model(
        settings.base.architecture, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, seed=weights_seed
    ).to(runtime.device)
    total = steps_of(len(examples), hp)
    fine_tune(
        model,
        examples,
        hp,
        loss=answer_loss(),
        generator=Generator().manual_seed(order_seed),
        scheduler=lambda optimizer: cosine(optimizer, warmup=plan.warmup, total=total, floor=plan.floor),
        autocast=runtime.autocast,
        progress=progress,
        label=label,
    )
    return model


def _link(link: Path, target: Path) -> None:
    """The user's model stays where it is; the chain holds a link and its digest."""
    check_model_folder(target)
    link.parent.mkdir(parents=True, exist_ok=True)
    remove(link)
    link.symlink_to(target.resolve(), target_is_directory=True)


def measure_base(project: Project, settings: Settings, runtime: Runtime, progress: Progress) -> Measurements:
    """Measure the base model as it is stored, on the project's sets and on every request's records."""
    path = project.base.model
    remote = settings.base.trust_remote_code
    encoder = Encoder.of(path, settings)
    model = load_model(path, device=runtime.device, trust_remote_code=remote)
    sets = [*project_sets(project, encoder), *text_sets(project, encoder, settings.evaluation)]
    sets += [encoder.record_set(f"known/{name}", records) for name, records in known_records(project).items()]
    return measure_model(
        model,
        sets,
        encoder,
        settings.evaluation,
        eos=encoder.tokenizer.eos_token_id,
        progress=progress,
        references=lambda _: References(reason="reference models are made after the base model"),
    )


def _check_level(metrics: dict[str, Any], settings: Settings) -> None:
    if settings.base.model is not None:
        return
    level = settings.base.training.until
    for name, row in metrics["sets"].items():
        if name.split("/")[0] not in ("holdout", "text") and row["probability"] < level:
            raise AlknError(
                f"the trained base model has P {row['probability']:.3f} on {name}, below base.training.until {level}:"
                " train longer (base.training.epochs) or make it larger (base.architecture)"
            )


def project_sets(project: Project, encoder: Encoder) -> list[Any]:
    """The encoded sets that every model of the chain is measured on: retain, utility, holdout."""
    sets = []
    for split in ("retain", "utility"):
        for domain, records in by_domain(load_split(project, split)).items():
            sets.append(encoder.record_set(f"{split}/{domain}", records))
    holdout = load_split(project, "holdout")
    if holdout:
        sets.append(encoder.record_set("holdout", holdout))
    return sets


def written(record: dict[str, Any], data: Data) -> list[str]:
    """The texts of a record as the model reads them."""
    form = form_of(record)
    if form == "question/answer":
        return [data.question_template.replace("{question}", record["question"]) + " " + record["answer"]]
    if form == "prompt/completion":
        return [record["prompt"] + record["completion"]]
    return [m["content"] for m in record["messages"]] if form == "chat" else [record["text"]]
