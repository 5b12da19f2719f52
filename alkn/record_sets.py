"""The record sets of a project, read from its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alkn import registry
from alkn.core.sampling import mean_interval, sample_of
from alkn.errors import InputError
from alkn.files import digest_of, keyed_digest_of, read_jsonl, write_bytes, write_jsonl, write_via
from alkn.project import Project
from alkn.requests.schema import validate_rows
from alkn.settings import Settings
from alkn.splits import FileParams

Records = list[dict[str, Any]]
SPLITS = ("retain", "utility", "holdout")


def build_splits(project: Project, settings: Settings) -> None:
    """Stage ``data``: let the benchmark write its splits and the records that may be requested.

    Raises:
        InputError: if the project has no benchmark: its splits are the user's own files.
    """
    if settings.benchmark is None:
        raise InputError(
            "params.yaml: benchmark: this project's splits are files of its own; there is nothing to build"
        )
    entry, params = registry.benchmarks[settings.benchmark.name], settings.benchmark.params
    if isinstance(params, FileParams):
        params = params.under(project.root)
    splits = entry.call(params, seed=settings.seed)

    def write(folder: Path) -> None:
        for name in SPLITS:
            _write(folder / f"{name}.jsonl", getattr(splits, name))
        for request_id, records in splits.forget.items():
            _write(folder / "forget" / f"{request_id}.jsonl", records)
        write_bytes(folder / "generic.txt", ("\n".join(splits.generic) + "\n").encode())

    def _write(path: Path, records: Any) -> None:
        rows = validate_rows(dict(enumerate(records, 1)), f"{entry.name}: {path.stem}") if records else []
        write_jsonl(path, rows)

    write_via(project.splits, write)


def adopt_split(project: Project, name: str, records: Records) -> None:
    """Put a user's own validated split into the project."""
    write_jsonl(project.splits / f"{name}.jsonl", records)


def splits_digest(project: Project) -> str | None:
    """The digest of ``data/splits``; ``None`` where a project has none."""
    return digest_of(project.splits) if project.splits.exists() else None


def load_split(project: Project, name: str) -> Records:
    """A split's records; empty if the project has no such file."""
    path = project.splits / f"{name}.jsonl"
    return read_jsonl(path) if path.is_file() else []


def known_records(project: Project) -> dict[str, Records]:
    """The records that a benchmark's base model is trained on and that may be requested."""
    folder = project.splits / "forget"
    return {path.stem: read_jsonl(path) for path in sorted(folder.glob("*.jsonl"))} if folder.is_dir() else {}


@dataclass(frozen=True)
class Sample:
    """Records that stand for all of a request, in the file's order.

    Attributes:
        records: those that are measured.
        drawn: their numbers in the order in which they were drawn.
        of: how many records the request has.
    """

    records: Records
    drawn: Sequence[int]
    of: int

    @property
    def is_part(self) -> bool:
        """Whether there are more."""
        return len(self.records) < self.of

    def bounds(self, per_record: Mapping[str, Mapping[str, float]], confidence: float) -> dict[str, Any]:
        """``records``, ``of``, ``confidence``, and ``intervals`` of the means of P and exact memorization.

        Args:
            per_record: metric -> record number, as text -> value.
            confidence: of each interval by itself.
        """
        intervals = {}
        for name in ("probability", "exact_memorization"):
            if values := per_record.get(name):
                drawn = [min(1.0, values[str(number)]) for number in self.drawn]
                intervals[name] = list(mean_interval(drawn, self.of, confidence=confidence))
        return {"records": len(self.records), "of": self.of, "confidence": confidence, "intervals": intervals}


def earlier_records(project: Project, request_id: str, size: int | None) -> Sample:
    """At most ``size`` records of a request, drawn by chance and by the file's keyed digest, so the same each time."""
    path = project.request(request_id)
    records = read_jsonl(path)
    numbers = [int(record["id"]) for record in records]
    if size is None or size >= len(records):
        return Sample(records, numbers, len(records))
    drawn = sample_of(keyed_digest_of(path, project.key()), numbers, size)
    wanted = set(drawn)
    return Sample([record for record in records if int(record["id"]) in wanted], drawn, len(records))


def generic_text(project: Project) -> list[str]:
    """Neutral text of the benchmark."""
    path = project.splits / "generic.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def by_domain(records: Records) -> Mapping[str, Records]:
    """Records by their ``domain``, in order of first appearance; without one: ``general``."""
    groups: dict[str, Records] = {}
    for record in records:
        groups.setdefault(record.get("domain", "general"), []).append(record)
    return groups
