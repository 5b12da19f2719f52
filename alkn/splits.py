"""What a benchmark hands over: records in their written form, split by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from alkn.registry import Params

RawRecord = Mapping[str, Any]


@dataclass(frozen=True)
class Splits:
    """Records of one benchmark, as dictionaries in a form of :mod:`alkn.requests.schema`.

    Attributes:
        retain: what G_r and retain losses are drawn from; ``domain`` names the part.
        utility: what utility is measured on, never drawn on; same domains, disjoint from retain.
        holdout: comparable records that no model is trained on.
        forget: request id -> its records; the base model is trained on them.
        generic: text that is neither personal nor to be forgotten; with retain it is what the
            base tokenizer is trained on.
    """

    retain: Sequence[RawRecord]
    utility: Sequence[RawRecord]
    holdout: Sequence[RawRecord] = ()
    forget: Mapping[str, Sequence[RawRecord]] = field(default_factory=dict)
    generic: Sequence[str] = ()


class FileParams(Params):
    """Parameters of a benchmark that reads files; as written, a path may be relative to the project folder."""

    def under(self, folder: Path) -> Self:
        """The same parameters with every relative path under ``folder``."""
        raise NotImplementedError


def path_under(folder: Path, path: str) -> str:
    """A path as the user wrote it, ``~`` expanded, and under ``folder`` if it is relative."""
    return str(folder / Path(path).expanduser())
