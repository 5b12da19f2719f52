"""A user's own files, for a base model that is trained from scratch on them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from alkn.errors import InputError
from alkn.registry import register_benchmark
from alkn.requests.ids import check_id
from alkn.requests.schema import read_records
from alkn.splits import FileParams, RawRecord, Splits, path_under


class RecordsParams(FileParams):
    """Paths of JSON Lines (or .txt) files in one of the forms of :mod:`alkn.requests.schema`.

    Attributes:
        retain: records that must stay known; the mask is learned from them.
        utility: records that utility is measured on; never drawn on.
        holdout: comparable records that are trained on by nobody; optional.
        forget: request id -> file; the base model is trained on them, and they may be requested.
        generic: a text file for the tokenizer; optional.
    """

    retain: str
    utility: str
    holdout: str | None = None
    forget: dict[str, str]
    generic: str | None = None

    def under(self, folder: Path) -> Self:
        """Every relative path under ``folder``."""
        paths = {"retain": self.retain, "utility": self.utility, "holdout": self.holdout, "generic": self.generic}
        files: dict[str, object] = {k: path_under(folder, path) for k, path in paths.items() if path is not None}
        files["forget"] = {request_id: path_under(folder, path) for request_id, path in self.forget.items()}
        return self.model_copy(update=files)


@register_benchmark("records", params=RecordsParams, source="the user's own files")
def records(params: RecordsParams, *, seed: int) -> Splits:
    """Read and validate the files. Nothing is random, so ``seed`` has no effect.

    Raises:
        InputError: one report a file, with its line numbers.
    """
    for request_id in params.forget:
        check_id(request_id)
    return Splits(
        retain=_read(params.retain),
        utility=_read(params.utility),
        holdout=_read(params.holdout) if params.holdout else (),
        forget={request_id: _read(path) for request_id, path in params.forget.items()},
        generic=_lines(params.generic) if params.generic else (),
    )


def _read(path: str) -> list[RawRecord]:
    return [{k: v for k, v in row.items() if k != "id"} for row in read_records(Path(path))]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from None
