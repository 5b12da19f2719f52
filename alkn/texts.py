"""The user's own texts that usefulness is also measured on: sets ``text/<name>``."""

from __future__ import annotations

from pathlib import Path

from alkn.core.probe import RecordSet
from alkn.encoding import Encoder
from alkn.errors import InputError
from alkn.files import digest_of
from alkn.project import Project
from alkn.requests.schema import read_records
from alkn.settings import Evaluation
from alkn.splits import path_under


def text_sets(project: Project, encoder: Encoder, settings: Evaluation) -> list[RecordSet]:
    """The encoded texts of ``evaluation.texts``.

    Raises:
        InputError: if a file is missing or holds no records.
    """
    return [
        encoder.record_set(f"text/{name}", read_records(path)) for name, path in text_files(project, settings).items()
    ]


def text_digests(project: Project, settings: Evaluation) -> dict[str, str]:
    """``text/<name>`` -> digest of the file.

    Raises:
        InputError: if a file is missing.
    """
    return {f"text/{name}": digest_of(path) for name, path in text_files(project, settings).items()}


def text_files(project: Project, settings: Evaluation) -> dict[str, Path]:
    """Name -> file; a relative path is relative to the project folder.

    Raises:
        InputError: if a file is missing.
    """
    files = {name: Path(path_under(project.root, path)) for name, path in settings.texts.items()}
    for name, path in files.items():
        if not path.is_file():
            raise InputError(f"params.yaml: evaluation.texts.{name}: {path}: no such file")
    return files
