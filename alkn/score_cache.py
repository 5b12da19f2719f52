"""Scores of records under a model, kept in .alkn/cache so that asking again costs nothing.

A file holds record numbers and what was measured of them, no text. It is derived: whoever deletes it loses
time only, and one that was changed is told and made again.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from alkn.files import digest_of, digest_of_value, write_bytes

logger = logging.getLogger(__name__)

SOURCES = (
    "encoding.py",
    "core/scoring.py",
    "core/labelled.py",
    "core/measured.py",
    "metrics/probability.py",
    "metrics/exact_memorization.py",
)
"""The files that decide the numbers: whoever edits one of them makes the old numbers another version's."""

Known = tuple[float, float]
"""P and exact memorization of a record."""


@cache
def metric_version() -> str:
    """A digest of the code that decides the numbers."""
    root = Path(__file__).parent
    return digest_of_value({name: digest_of(root / name) for name in SOURCES})


@dataclass
class ScoreCache:
    """The folder of kept scores.

    Attributes:
        folder: where the files are.
        key: the project's key; names and contents are sealed with it.
        told: ids of files that were not what was written, with what was wrong; they were measured again.
    """

    folder: Path
    key: bytes
    told: list[str] = field(default_factory=list)

    def load(self, of: Mapping[str, str]) -> dict[int, Known]:
        """Record number -> scores, as far as they are kept.

        Args:
            of: name -> digest of everything that the numbers depend on.
        """
        path = self._path(of)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            return self._refuse(path, f"cannot be read ({type(error).__name__})")
        try:
            sealed = json.loads(raw)
            content, seal = sealed["content"], str(sealed["seal"])
        except (ValueError, TypeError, KeyError):
            return self._refuse(path, "is damaged")
        if not hmac.compare_digest(seal, self._seal(content)):
            return self._refuse(path, "was changed after it was written")
        return {int(number): (float(p), float(hits)) for number, (p, hits) in content["records"].items()}

    def save(self, of: Mapping[str, str], records: Mapping[int, Known]) -> None:
        """Keep what is known of a model on a set of records, all of it."""
        content = {"of": dict(of), "records": {str(number): list(records[number]) for number in sorted(records)}}
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(self._path(of), json.dumps({"content": content, "seal": self._seal(content)}).encode())

    def _refuse(self, path: Path, fault: str) -> dict[int, Known]:
        self.told.append(f"{path.name} {fault}")
        logger.warning("%s %s; its records are measured again", path, fault)
        return {}

    def _path(self, of: Mapping[str, str]) -> Path:
        return self.folder / f"{self._seal(dict(of))[:40]}.json"

    def _seal(self, content: Any) -> str:
        return hmac.digest(self.key, json.dumps(content, sort_keys=True).encode(), "sha256").hex()
