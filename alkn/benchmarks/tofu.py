"""TOFU: questions about fictitious authors, from a folder of JSON Lines or from the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from alkn.errors import InputError
from alkn.files import read_jsonl
from alkn.registry import register_benchmark
from alkn.splits import FileParams, RawRecord, Splits, path_under

HUB = "locuslab/TOFU"
DOMAINS = {"real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed"}
"""Utility domain -> configuration, beside the domain ``retain``."""


class TofuParams(FileParams):
    """Which part of TOFU, and how it is cut into requests.

    Attributes:
        path: folder of ``<config>.jsonl`` files; ``null``: ``$ALKN_DATA/tofu`` if that variable is set, else the hub.
        forget: configuration whose records are requested, in order.
        skip: records of it before the first request's.
        requests: number of requests.
        records_per_request: records of each; 20 are one author.
        retain: configuration of the domain ``retain``.
        retain_records: how many of it, from its beginning; ``null``: all.
        holdout: configuration of authors that nobody trains on; ``null``: none.
        generic: configuration whose text the tokenizer is trained on beside the retain records; ``null``: none.
            It should not hold what is requested: a vocabulary remembers names.
    """

    path: str | None = None
    forget: str = "forget10_perturbed"
    skip: int = Field(0, ge=0)
    requests: int = Field(5, ge=1)
    records_per_request: int = Field(80, ge=1)
    retain: str = "retain_perturbed"
    retain_records: int | None = Field(None, ge=2)
    holdout: str | None = "holdout10"
    generic: str | None = "retain90"

    def under(self, folder: Path) -> Self:
        """``path`` under ``folder`` if it is relative."""
        return self if self.path is None else self.model_copy(update={"path": path_under(folder, self.path)})


@register_benchmark(
    "tofu", params=TofuParams, source="Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs"
)
def tofu(params: TofuParams, *, seed: int) -> Splits:
    """The chain of METHOD.md: the records of ``forget`` from ``skip`` on in order, so many a request.

    Each utility domain is halved by position: the even records may be drawn on, the odd ones never.
    Nothing is random, so ``seed`` has no effect.

    Raises:
        InputError: if a file is missing or holds too few records, or if a record is both requested and retained.
    """
    size = params.records_per_request
    wanted = _first(params, params.forget, params.skip + params.requests * size)[params.skip :]
    retained = _first(params, params.retain, params.retain_records)
    asked = {str(row["question"]) for row in wanted}
    both = sum(str(row["question"]) in asked for row in retained)
    if both:
        raise InputError(
            f"tofu: {both} of the retain records are requested too; expected none; see benchmark.skip and"
            " benchmark.retain_records"
        )
    domains = {"retain": retained, **{domain: _read(params, config) for domain, config in DOMAINS.items()}}
    return Splits(
        retain=[{**row, "domain": domain} for domain, rows in domains.items() for row in rows[0::2]],
        utility=[{**row, "domain": domain} for domain, rows in domains.items() for row in rows[1::2]],
        holdout=_read(params, params.holdout) if params.holdout else (),
        forget={f"tofu_{i + 1}": wanted[i * size : (i + 1) * size] for i in range(params.requests)},
        generic=[
            f"{row['question']} {row['answer']}".replace("\n", " ")
            for row in (_read(params, params.generic) if params.generic else ())
        ],
    )


def _first(params: TofuParams, config: str, count: int | None) -> Sequence[RawRecord]:
    """The first records of a configuration; ``None``: all."""
    rows = _read(params, config)
    if count is not None and len(rows) < count:
        raise InputError(f"tofu: {config} holds {len(rows)} records, and {count} are asked for")
    return rows[:count]


def _read(params: TofuParams, config: str) -> Sequence[RawRecord]:
    folder = params.path or (os.path.join(os.environ["ALKN_DATA"], "tofu") if os.environ.get("ALKN_DATA") else None)
    if folder is None:
        return _from_hub(config)
    path = Path(folder) / f"{config}.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; benchmark.path is the folder of TOFU's configurations as JSON Lines")
    return read_jsonl(path)


def _from_hub(config: str) -> Sequence[RawRecord]:
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(HUB, config, split="train")
    except (OSError, ValueError) as error:
        raise InputError(
            f"tofu: the hub did not give {HUB} {config} ({type(error).__name__}); without a network, set benchmark.path"
        ) from None
    return [dict(row) for row in rows]
