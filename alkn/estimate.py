"""What a run will cost before it is made: time, memory and disk."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from alkn.core.scoring import mean_gradient
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import size_of
from alkn.manifest import read_manifest
from alkn.models import context_length, load_model, load_tokenizer
from alkn.project import Project
from alkn.record_sets import load_split
from alkn.requests.ledger import Ledger
from alkn.runtime import Runtime
from alkn.settings import Settings

PROBE_RECORDS = 32
FIRST_GUESS_PASSES = 120
"""Record passes a forget record where the chain has no step to learn from (docs/EXPERIMENTS.md)."""
COPIES = 8
"""float32 copies of the weights at the peak: model, θ, gradient, G_r, two moments, step, mask."""
ADVERSARY_COPIES = 6
"""More of the trained weights where an adversary relearns: his, gradient, two moments; the model's own and gradient."""
ADAPTED_COPIES = 3
"""The same where adapters are trained: model, θ_{t-1}, merged layers."""

STEP_SIZE = 5
"""Models that a step takes on disk: model and task vector, both again in DVC's cache, the vector in MLflow."""


@dataclass(frozen=True)
class Estimate:
    """The cost of what is pending.

    Attributes:
        seconds: wall time, from the steps made so far or a timed probe; ``None`` before there is a base model.
        memory: bytes at the peak, model arithmetic only.
        disk: bytes that the steps will take, DVC's cache included.
        free: bytes free on the project's file system.
        source: what the time was judged by.
    """

    seconds: float | None
    memory: int
    disk: int
    free: int
    source: str


def estimate(project: Project, settings: Settings, ledger: Ledger) -> Estimate:
    """Judge the cost of the pending requests."""
    size = _model_bytes(project, settings)
    count = len(ledger.pending)
    records = sum(entry.records for entry in ledger.pending.values())
    seconds, source = _seconds(project, settings, ledger, records)
    copies = COPIES if settings.lora.rank is None else ADAPTED_COPIES
    if settings.lora.rank is None and getattr(settings.method.params, "resist_weight", False):
        copies += ADVERSARY_COPIES
    return Estimate(seconds, copies * size, count * STEP_SIZE * size, free_bytes(project.root), source)


def check_disk(project: Project) -> None:
    """Refuse to begin a step that the disk cannot hold.

    Raises:
        InputError: with what is needed and what is free.
    """
    if not project.base.model.exists():
        return
    needed, free = STEP_SIZE * size_of(project.base.model) + 2**20, free_bytes(project.root)
    if free < needed:
        raise InputError(
            f"{project.root}: the disk is full: a step needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free"
        )


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds ``path``."""
    return shutil.disk_usage(path).free


def _model_bytes(project: Project, settings: Settings) -> int:
    if project.base.model.exists():
        return size_of(project.base.model)
    if settings.base.model is not None:
        return size_of(project.root / Path(settings.base.model).expanduser())
    a = settings.base.architecture
    return 4 * (a.vocab_size * a.hidden_size + a.layers * a.hidden_size * (4 * a.hidden_size + 3 * a.intermediate_size))


def _seconds(project: Project, settings: Settings, ledger: Ledger, records: int) -> tuple[float | None, str]:
    known = [
        (sum(manifest["seconds"].values()), ledger.entry(name).records)
        for name in (*ledger.accepted, *ledger.rejected)
        if (manifest := read_manifest(project.step(name))) is not None
    ]
    if known:
        rate = sum(s for s, _ in known) / sum(n for _, n in known)
        return rate * records, f"{len(known)} steps of this chain"
    if not project.base.model.exists():
        return None, "there is no base model yet: it is made first"
    return _probe(project, settings) * FIRST_GUESS_PASSES * records, "a timed probe; no step of this chain to judge by"


def _probe(project: Project, settings: Settings) -> float:
    """Seconds a record pass, forward and backward."""
    records = load_split(project, "retain")[:PROBE_RECORDS]
    if not records:
        raise InputError("data/splits/retain.jsonl: there is no retain record to time a pass with")
    runtime = Runtime(settings.run)
    path = project.base.model
    remote = settings.base.trust_remote_code
    context = context_length(path, trust_remote_code=remote)
    encoder = Encoder(load_tokenizer(path, trust_remote_code=remote), settings.data, context=context)
    examples = encoder.examples("retain", records)
    model = load_model(path, device=runtime.device, trust_remote_code=remote).float()
    mean_gradient(model, examples, range(len(examples)))
    started = time.monotonic()
    mean_gradient(model, examples, range(len(examples)))
    return (time.monotonic() - started) / len(examples)
