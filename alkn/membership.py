"""The parameters that membership attacks share."""

from __future__ import annotations

from pydantic import Field

from alkn.registry import Params


class MembershipParams(Params):
    """Interval of a membership attack's AUC.

    Attributes:
        samples: bootstrap samples.
        confidence: share of them inside the interval.
        seed: of the draws.
    """

    samples: int = Field(1000, ge=1)
    confidence: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)
