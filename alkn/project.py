"""A project folder: where everything lives, its key, its locks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from alkn.errors import ChainBusy, InputError
from alkn.files import write_bytes
from alkn.settings import Settings, load_settings

LEDGER_TIMEOUT_S = 30


@dataclass(frozen=True)
class Step:
    """The paths of one step, or of the base model, which has a model, metrics and a manifest only."""

    folder: Path

    @property
    def id(self) -> str:
        """The request's id, or ``base``."""
        return self.folder.name

    @property
    def model(self) -> Path:
        """The step's model, a transformers folder."""
        return self.folder / "model"

    @property
    def task_vector(self) -> Path:
        """What the step took away, θ_{t-1} − θ_t."""
        return self.folder / "task_vector.safetensors"

    @property
    def state(self) -> Path:
        """What the method leaves for the next step."""
        return self.folder / "state.safetensors"

    @property
    def unlearning(self) -> Path:
        """The method's report: written last by the unlearning, so it says that this part is complete."""
        return self.folder / "unlearning.json"

    @property
    def evaluation(self) -> Path:
        """Every metric on every set."""
        return self.folder / "evaluation.json"

    @property
    def per_record(self) -> Path:
        """Set -> metric -> record number -> value: numbers only, no text."""
        return self.folder / "per_record.json"

    @property
    def metrics(self) -> Path:
        """The few numbers that people and ``dvc metrics show`` read first."""
        return self.folder / "metrics.json"

    @property
    def attacks(self) -> Path:
        """What attacks bring back, a curve each; of a step only."""
        return self.folder / "attacks.json"

    @property
    def gate(self) -> Path:
        """The verdict with every gate's checks."""
        return self.folder / "gate.json"

    @property
    def params(self) -> Path:
        """The settings this step is made with, frozen when it begins; in git."""
        return self.folder / "params.yaml"

    @property
    def manifest(self) -> Path:
        """All digests in and out; written last; in git."""
        return self.folder / "manifest.json"

    @property
    def outputs(self) -> tuple[Path, ...]:
        """What DVC holds of a step, in the order it is made."""
        return (
            self.model, self.task_vector, self.state, self.unlearning, self.evaluation, self.per_record, self.attacks,
            self.metrics, self.gate,
        )  # fmt: skip


@dataclass(frozen=True)
class Project:
    """A project folder."""

    root: Path

    @classmethod
    def at(cls, root: Path) -> Project:
        """The project at ``root``.

        Raises:
            InputError: if the folder holds no params.yaml or no ledger.
        """
        project = cls(root.resolve())
        for needed in (project.params, project.ledger):
            if not needed.is_file():
                raise InputError(f"{root}: not a project folder, {needed.relative_to(project.root)} is missing")
        return project

    @property
    def params(self) -> Path:
        """params.yaml."""
        return self.root / "params.yaml"

    @property
    def ledger(self) -> Path:
        """data/ledger.yaml, the chain."""
        return self.root / "data" / "ledger.yaml"

    @property
    def splits(self) -> Path:
        """data/splits."""
        return self.root / "data" / "splits"

    @property
    def data_params(self) -> Path:
        """The settings that the benchmark's splits were made with; in git."""
        return self.root / "data" / "params.yaml"

    @property
    def private(self) -> Path:
        """.alkn: the key and the locks; never in git."""
        return self.root / ".alkn"

    @property
    def base(self) -> Step:
        """The base model's folder."""
        return self.step("base")

    def request(self, request_id: str) -> Path:
        """The records of a request."""
        return self.root / "data" / "requests" / f"{request_id}.jsonl"

    def step(self, request_id: str) -> Step:
        """The paths of a step."""
        return Step(self.root / "steps" / request_id)

    def settings(self, overrides: tuple[str, ...] = ()) -> Settings:
        """The project's settings."""
        return load_settings(self.params, overrides)

    def key(self, *, create: bool = False) -> bytes:
        """The key of the digests of personal text, 32 bytes.

        Args:
            create: make one if there is none; only before the first digest is written.

        Raises:
            InputError: if there is none and none may be made.
        """
        path = self.private / "key"
        if not path.is_file():
            if not create:
                raise InputError(f"{path}: the key of the digests is missing; the chain's owner has it")
            self.private.mkdir(mode=0o700, exist_ok=True)
            write_bytes(path, secrets.token_bytes(32))
            os.chmod(path, 0o600)
        return path.read_bytes()

    @contextmanager
    def chain_lock(self) -> Iterator[None]:
        """Hold the chain: one writer at a time, released by the system if the process dies.

        Raises:
            ChainBusy: if another process holds it.
        """
        self.private.mkdir(mode=0o700, exist_ok=True)
        try:
            with FileLock(self.private / "chain.lock", timeout=0):
                yield
        except Timeout:
            raise ChainBusy(f"{self.root}: another 'alkn run' is at work on this chain; wait until it ends") from None

    @contextmanager
    def ledger_lock(self) -> Iterator[None]:
        """Hold the ledger for a short edit; a request can be added while a run goes on."""
        self.private.mkdir(mode=0o700, exist_ok=True)
        try:
            with FileLock(self.private / "ledger.lock", timeout=LEDGER_TIMEOUT_S):
                yield
        except Timeout:
            raise ChainBusy(f"{self.ledger}: another process has been editing it for {LEDGER_TIMEOUT_S} s") from None
