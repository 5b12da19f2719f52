"""What a benchmark hands over: records in their written form, split by what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
