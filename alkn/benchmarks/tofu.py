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
DOMAINS = {
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}


class TofuParams(FileParams):
    """Which part of TOFU, and how it is cut into requests.

    Attributes:
        path: folder of ``<config>.jsonl`` files; ``null``: ``$ALKN_DATA/tofu`` if that variable is set, else the hub.
        forget: configuration whose records are requested, in order.
        requests: number of requests.
        records_per_request: records of each; 20 are one author.
        holdout: configuration of authors that nobody trains on; ``null``: none.
        generic: configuration whose text the tokenizer is trained on beside the retain records.
    """

    path: str | None = None
    forget: str = "forget10_perturbed"
    requests: int = Field(5, ge=1)
    records_per_request: int = Field(80, ge=1)
    holdout: str | None = "holdout10"
    generic: str = "retain90"

    def under(self, folder: Path) -> Self:
        """``path`` under ``folder`` if it is relative."""
        return self if self.path is None else self.model_copy(update={"path": path_under(folder, self.path)})


@register_benchmark(
    "tofu", params=TofuParams, source="Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs"
)
def tofu(params: TofuParams, *, seed: int) -> Splits:
    """The chain of METHOD.md: the first records of ``forget`` in order, so many a request.

    Each utility domain is halved by position: the even records may be drawn on, the odd ones never.
    Nothing is random, so ``seed`` has no effect.

    Raises:
        InputError: if a file is missing or holds too few records.
    """
    wanted = _read(params, params.forget)
    needed = params.requests * params.records_per_request
    if len(wanted) < needed:
        raise InputError(f"tofu: {params.forget} holds {len(wanted)} records, and {needed} are asked for")
    size = params.records_per_request
    domains = {domain: _read(params, config) for domain, config in DOMAINS.items()}
    return Splits(
        retain=[{**row, "domain": domain} for domain, rows in domains.items() for row in rows[0::2]],
        utility=[{**row, "domain": domain} for domain, rows in domains.items() for row in rows[1::2]],
        holdout=_read(params, params.holdout) if params.holdout else (),
        forget={f"tofu_{i + 1}": wanted[i * size : (i + 1) * size] for i in range(params.requests)},
        generic=[f"{row['question']} {row['answer']}".replace("\n", " ") for row in _read(params, params.generic)],
    )


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
